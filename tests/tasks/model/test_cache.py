import pytest
import torch
from torch import Tensor, nn

from prefixquant.kernels.hadamard import hadamard_transform
from prefixquant.tasks.model.cache import prefix_cache
from prefixquant.tasks.model.modules import Site
from prefixquant.tasks.model.quantizer import SiteQuantizer
from prefixquant.tasks.model.spec import KeyValueSpec


def attention(*, rotate: bool = False, bits: int | None = None) -> nn.Module:
    module = nn.Module()
    spec = None if bits is None else KeyValueSpec(bits=bits, mode="dynamic")
    module.rotate_queries = rotate
    module.key_site, module.value_site = (Site(spec and SiteQuantizer(spec, 16, 2)) for _ in range(2))
    return module


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KEYS, VALUES = random(3, 2, 5, 16, seed=0), random(3, 2, 5, 16, seed=1)
PREFIX = random(2, 2, 4, 16, seed=2), random(2, 2, 4, 16, seed=3)  # two layers, two heads, four tokens


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [None, 3])
def test_cache_starts_with_the_prefix_as_it_is_and_treats_what_enters(rotate, bits):
    module = attention(rotate=rotate, bits=bits)
    cache = prefix_cache([module, module], PREFIX, batch_size=3)
    for layer in range(2):
        assert cache.get_seq_length(layer) == 4
        keys, values = cache.update(KEYS, VALUES, layer)
        assert cache.get_seq_length(layer) == 9
        for row in range(3):
            assert torch.equal(keys[row, :, :4], PREFIX[0][layer])
            assert torch.equal(values[row, :, :4], PREFIX[1][layer])
        entering = hadamard_transform(KEYS) if rotate else KEYS
        assert torch.equal(keys[:, :, 4:], module.key_site(entering))
        assert torch.equal(values[:, :, 4:], module.value_site(VALUES))
        assert torch.equal(keys[:, :, 4:], entering) == (bits is None)


@pytest.mark.parametrize("prefix", [None, (PREFIX[0][:, :, :0], PREFIX[1][:, :, :0])], ids=["none", "empty"])
def test_cache_without_prefix_is_empty(prefix):
    cache = prefix_cache([attention()], prefix, batch_size=3)
    assert cache.get_seq_length() == 0
    keys, values = cache.update(KEYS, VALUES, 0)
    assert torch.equal(keys, KEYS)
    assert torch.equal(values, VALUES)


def test_cache_quantizes_each_token_once_and_leaves_the_prefix_for_the_next_forward():
    module = attention(rotate=True, bits=3)
    whole, stepwise = (prefix_cache([module, module], PREFIX, batch_size=3) for _ in range(2))
    wanted, _ = whole.update(KEYS, VALUES, 0)
    stepwise.update(KEYS[:, :, :3], VALUES[:, :, :3], 0)
    got, _ = stepwise.update(KEYS[:, :, 3:], VALUES[:, :, 3:], 0)
    assert torch.equal(got, wanted)
    assert PREFIX[0].shape == (2, 2, 4, 16)
