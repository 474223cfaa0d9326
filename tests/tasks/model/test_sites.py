from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from prefixquant.kernels.hadamard import hadamard_transform
from prefixquant.tasks.model.block import Block
from prefixquant.tasks.model.cache import prefix_cache
from prefixquant.tasks.model.sites import ALL_SITES, KEYS
from prefixquant.tasks.model.spec import KeyValueSpec, QuantizeConfig
from prefixquant.tasks.rotate import RotateConfig

DYNAMIC = KeyValueSpec(mode="dynamic", bits=3)
KEYS_ALONE = QuantizeConfig(weights=None, activations=None, values=None, keys=DYNAMIC)
R3 = RotateConfig(r1=None, r2=None, r3=True, r4=False)


def hidden(count: int = 2, length: int = 7) -> Tensor:
    return torch.randn(count, length, 48, generator=torch.Generator().manual_seed(3))


def cached_keys(block: Block) -> Tensor:
    """Return the keys [B, H, T, C] in the cache after a forward."""
    cache = prefix_cache([block.attention], None, 2)
    with torch.no_grad():
        block.model(inputs_embeds=hidden(), past_key_values=cache, use_cache=True)
    return cache.layers[0].keys


def observed(block: Block, site: str) -> Tensor:
    """Return what a site of the full-precision block sees."""
    seen: list[Tensor] = []
    block.sites[site].observer = seen.append
    with block.only():
        block(hidden(), None)
    return seen[0]


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
@pytest.mark.parametrize("before_rope", [False, True])
def test_block_has_the_six_sites_in_the_order_data_flows(variant, before_rope):
    quantize = replace(QuantizeConfig(), keys=KeyValueSpec(before_rope=before_rope))
    block = tiny.build_blocks(tiny.tiny_variant(variant), quantize=quantize)[0]
    assert tuple(block.sites) == ALL_SITES
    order: list[str] = []
    for name, site in block.sites.items():
        site.observer = lambda _x, name=name: order.append(name)
    block(hidden(), None)
    assert sorted(order) == sorted(ALL_SITES)
    assert [name for name in order if name != KEYS] == [name for name in ALL_SITES if name != KEYS]


def projected_keys(model: torch.nn.Module) -> Tensor:
    """Return transformers' keys [B, H, T, C] before the rotary embedding."""
    layer = model.model.layers[0]
    keys = layer.self_attn.k_proj(layer.input_layernorm(hidden())).unflatten(-1, (2, 16))
    return (layer.self_attn.k_norm(keys) if hasattr(layer.self_attn, "k_norm") else keys).transpose(1, 2)


@pytest.mark.parametrize("variant", ["llama-biases", "qwen2", "qwen3"])
def test_keys_before_rope_are_those_of_the_projection_or_its_norm(variant):
    model = tiny.tiny_variant(variant)
    keys = replace(DYNAMIC, before_rope=True)
    block = tiny.build_blocks(model, quantize=replace(KEYS_ALONE, keys=keys))[0]
    torch.testing.assert_close(observed(block, KEYS), projected_keys(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_keys_before_rope_are_quantized_before_it(variant):
    model = tiny.tiny_variant(variant)
    quantize = replace(KEYS_ALONE, keys=replace(DYNAMIC, before_rope=True))
    block = tiny.build_blocks(model, quantize=quantize)[0]
    plain = projected_keys(model)
    wanted = block.sites[KEYS].quantizer(plain)
    assert wanted[0, 0, 3].unique().numel() <= 8
    position = torch.arange(7).unsqueeze(0)
    cos, sin = model.model.rotary_emb(hidden(), position)
    half = torch.cat((-wanted[..., 8:], wanted[..., :8]), dim=-1)
    torch.testing.assert_close(cached_keys(block), wanted * cos + half * sin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
@pytest.mark.parametrize("rotate", [None, R3], ids=["plain", "r3"])
def test_keys_after_rope_lie_on_the_grid_in_the_cache(variant, rotate):
    block = tiny.build_blocks(tiny.tiny_variant(variant), rotate, KEYS_ALONE)[0]
    seen = observed(block, KEYS)
    keys = cached_keys(block)
    assert torch.equal(keys, block.sites[KEYS].quantizer(seen))
    assert all(row.unique().numel() <= 8 for row in keys.flatten(0, 2))


def test_r3_rotates_the_keys_that_the_site_sees():
    model = tiny.tiny_variant("qwen3")
    plain, rotated = (observed(tiny.build_blocks(model, rotate, KEYS_ALONE)[0], KEYS) for rotate in (None, R3))
    torch.testing.assert_close(rotated, hadamard_transform(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r3", [True, False])
def test_queries_are_rotated_only_with_r3(r3):
    block = tiny.build_blocks(tiny.tiny_variant("llama"), replace(R3, r3=r3))[0]
    assert block.attention.rotate_queries is r3
