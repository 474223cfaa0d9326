import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefixquant.kernels.hadamard import hadamard_transform
from prefixquant.tasks.model.modules import ATTENTION, Site, SiteLinear, SiteNorm, attention, register_attention
from prefixquant.tasks.model.quantizer import SiteQuantizer
from prefixquant.tasks.model.spec import ActivationSpec


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(channels: int) -> SiteQuantizer:
    return SiteQuantizer(ActivationSpec(mode="dynamic", granularity="token"), channels)


def test_site_quantizes_only_while_enabled_and_shows_its_observer_what_came_in():
    site, seen = Site(quantizer(24)), []
    site.observer = seen.append
    x = random(2, 5, 24)
    assert not torch.equal(site(x), x)
    site.enabled = False
    assert site(x) is x
    assert all(tensor is x for tensor in seen)
    assert len(seen) == 2


def test_site_without_quantizer_passes_on():
    x = random(2, 5, 24)
    assert Site(None)(x) is x


def test_site_norm_is_rms_norm_with_its_own_eps():
    x, gain = random(2, 5, 24) * 0.1, random(24, seed=1)
    norm = SiteNorm(gain, 0.01, Site(None))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), gain, 0.01))


def test_site_norm_quantizes_its_output():
    x, site = random(2, 5, 24), Site(quantizer(24))
    gain = random(24, seed=1)
    torch.testing.assert_close(SiteNorm(gain, 1e-5, site)(x), site(F.rms_norm(x, (24,), gain, 1e-5)))


@pytest.mark.parametrize("hadamard", [False, True])
def test_site_linear_transforms_then_quantizes_then_multiplies(hadamard):
    x, weight, bias, site = random(2, 5, 24), random(7, 24, seed=1), random(7, seed=2), Site(quantizer(24))
    linear = SiteLinear(weight, bias, site=site, hadamard=hadamard)
    wanted = site(hadamard_transform(x) if hadamard else x)
    assert torch.equal(linear.prepare(x), wanted)
    torch.testing.assert_close(linear(x), wanted @ weight.T + bias)


@pytest.mark.parametrize("rotate", [True, False])
def test_attention_rotates_the_queries_only_if_asked(rotate):
    module = nn.Module()
    module.rotate_queries, module.is_causal, module.num_key_value_groups = rotate, True, 2
    query, key, value = random(2, 4, 5, 16), random(2, 2, 5, 16, seed=1), random(2, 2, 5, 16, seed=2)
    got, _ = attention(module, query, hadamard_transform(key) if rotate else key, value, None, scaling=0.25)
    repeated = (part.repeat_interleave(2, dim=1) for part in (key, value))
    wanted = F.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_attention_has_a_mask_function_under_the_same_name():
    register_attention()
    assert AttentionInterface()[ATTENTION] is attention
    assert AttentionMaskInterface()[ATTENTION] is not None
