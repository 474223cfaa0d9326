"""Every way of a training step computes the same step."""

from dataclasses import fields

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from prefixquant.kernels.fake_quantize import fake_quantize, fake_quantize_with_codes
from prefixquant.tasks.losses import mse
from prefixquant.tasks.model import code_product, modules
from prefixquant.tasks.model.modules import attention
from prefixquant.tasks.model.quantizer import round_to_nearest
from prefixquant.tasks.model.spec import ActivationSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.model.trainable import make_trainable
from prefixquant.tasks.model.ways import StepWays
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.train_block import BlockLoss

OLDER = StepWays(attention="lower_right", code_products=False)
WAYS = {
    "padded": StepWays(code_products=False),
    "code-products": StepWays(attention="lower_right"),
    "default": StepWays(),
}


@pytest.fixture
def with_codes(monkeypatch):
    """Products of codes on the CPU as well, and in every type."""
    monkeypatch.setattr(modules, "fits_fp8", lambda weight, dtype: True)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("tokens", [2, 7])
@pytest.mark.parametrize("prefix", [0, 1, 3, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_padded_attention_and_its_gradients_are_those_of_the_aligned_mask(kv_heads, prefix, tokens):
    found = []
    for padded in (False, True):
        module = nn.Module()
        module.rotate_queries, module.pads_queries, module.is_causal = False, padded, True
        module.num_key_value_groups = 6 // kv_heads
        leaves = [random(2, 6, tokens, 16).requires_grad_()]
        leaves += [random(2, kv_heads, prefix + tokens, 16, seed=seed).requires_grad_() for seed in (1, 2)]
        output, _ = attention(module, *leaves, None, scaling=0.3)
        assert output.shape == (2, tokens, 6, 16)
        found.append((output, *torch.autograd.grad(output, leaves, random(*output.shape, seed=3))))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_a_product_of_codes_is_the_exact_product_of_the_grids_rounded_once():
    x_scale, scale = torch.tensor(0.37), torch.rand(24, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    x = fake_quantize(random(2, 5, 64, dtype=torch.float32), x_scale, None, -8, 7)
    weight, codes = fake_quantize_with_codes(random(24, 64, seed=1, dtype=torch.float32), scale, -8, 7)
    wanted = x.double() @ weight.double().T
    rounded = [each.bfloat16().requires_grad_() for each in (x, weight)]
    y = code_product.code_product(*rounded, codes, x_scale, scale)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-6)  # F.linear starts from rounded factors
    grad = random(*y.shape, seed=3).bfloat16()
    for mine, theirs in zip(
        torch.autograd.grad(y, rounded, grad), torch.autograd.grad(F.linear(*rounded), rounded, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def trainable_block(quantize=QuantizeConfig()):  # noqa: B008 - frozen
    block = tiny.build_blocks(tiny.tiny_variant("llama"), RotateConfig(), quantize)[0]
    for site in block.sites.values():
        if site.quantizer is not None and site.quantizer.spec.mode == "static":
            site.quantizer.scale.fill_(0.4)
    weights = {role: block.linear(role).weight.data.clone() for role in block.family.linears}
    grids = {}
    if quantize.weights is not None:
        grids = {role: round_to_nearest(weight, quantize.weights, 0.7) for role, weight in weights.items()}
    for each in make_trainable(block, weights, grids, quantize.weights):
        each.parameter.requires_grad_(True)
    return block


def step(ways, prefix_tokens, precision, compiled=True, frozen=False):
    """Return the loss and every gradient of a tiny block's step; compiled: as traced, without generated code."""
    block = trainable_block()
    block.take_ways(ways)
    for role in block.family.linears if frozen else ():
        block.linear(role).weight.requires_grad_(False)
    heads, channels = block.attention.config.num_key_value_heads, block.attention.head_dim
    keys, values = (random(heads, prefix_tokens, channels, seed=seed, dtype=torch.float32) for seed in (4, 5))
    module = BlockLoss(block, (keys, values) if prefix_tokens else None, mse)
    if compiled:
        torch._dynamo.reset()
        module._compiled = torch.compile(module._loss, backend="aot_eager", fullgraph=True, dynamic=False)
    batch = [random(2, 10, 48, seed=seed, dtype=torch.float32) for seed in (6, 7)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = module(*batch)
    loss.backward()
    torch._dynamo.reset()
    return loss.detach(), {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen-weights"])
@pytest.mark.parametrize("prefix_tokens", [0, 3])
@pytest.mark.parametrize("name", WAYS)
def test_a_compiled_step_is_the_same_in_every_way(with_codes, name, prefix_tokens, frozen):
    loss, wanted = step(OLDER, prefix_tokens, "fp32", frozen=frozen)
    found_loss, found = step(WAYS[name], prefix_tokens, "fp32", frozen=frozen)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == wanted.keys()
    for each, value in wanted.items():
        torch.testing.assert_close(found[each], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()), msg=each)


def test_a_step_under_autocast_is_no_further_from_the_step_in_float32_than_in_the_older_ways(with_codes):
    exact_loss, exact = step(OLDER, 3, "fp32")
    loss, older = step(OLDER, 3, "bf16")
    found_loss, found = step(StepWays(), 3, "bf16")
    assert abs(found_loss - exact_loss) < 1.25 * abs(loss - exact_loss)
    for name, value in exact.items():
        if value.ndim == 2:  # a value on the border of two codes falls to either side, and is worth a step of 4 bits
            far, wanted = ((each[name] - value).norm() / value.norm() for each in (found, older))
            assert far < 1.25 * wanted + 0.01, name


def test_a_step_that_is_not_compiled_makes_no_products_of_codes(with_codes):
    plain, wanted = step(StepWays(code_products=False), 3, "fp32", compiled=False)
    mine, found = step(StepWays(), 3, "fp32", compiled=False)
    assert torch.equal(mine, plain)
    assert all(torch.equal(found[each], value) for each, value in wanted.items())


def multiplying_codes(quantize=QuantizeConfig(), precision="bf16"):  # noqa: B008 - frozen
    """Return the linears of a block whose compiled steps make products of codes."""
    block = trainable_block(quantize)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"), block.weights_on_grid():
        return {role for role in block.family.linears if block.linear(role).codes_on_grid is not None}


@pytest.mark.parametrize(
    "quantize",
    [
        QuantizeConfig(weights=WeightSpec(bits=8)),
        QuantizeConfig(weights=WeightSpec(symmetric=False)),
        QuantizeConfig(weights=WeightSpec(granularity="group", group_size=16)),
        QuantizeConfig(weights=WeightSpec(granularity="tensor")),
        QuantizeConfig(weights=None),
        QuantizeConfig(activations=ActivationSpec(bits=8)),
        QuantizeConfig(activations=ActivationSpec(symmetric=False)),
        QuantizeConfig(activations=ActivationSpec(mode="dynamic", granularity="token")),
        QuantizeConfig(activations=None),
    ],
    ids=str,
)
def test_products_that_are_not_of_two_fine_grids_are_ordinary(with_codes, quantize):
    assert multiplying_codes(quantize) == set()


@pytest.mark.parametrize(
    ("is_hopper", "has_triton", "precision", "some"),
    [
        (True, True, "bf16", True),
        (True, True, "fp32", False),
        (True, False, "bf16", False),
        (False, True, "bf16", False),
    ],
)
def test_products_are_ordinary_where_fp8_was_not_measured(monkeypatch, is_hopper, has_triton, precision, some):
    monkeypatch.setattr(code_product, "_is_hopper", lambda device: is_hopper)
    monkeypatch.setattr(code_product, "uses_triton", lambda weight: has_triton)
    assert len(multiplying_codes(precision=precision)) == 7 * some


def test_products_in_fp8_take_sizes_of_whole_sixteens(monkeypatch):
    monkeypatch.setattr(code_product, "_is_hopper", lambda device: True)
    monkeypatch.setattr(code_product, "uses_triton", lambda weight: True)
    fits = {shape: code_product.fits_fp8(torch.empty(shape), torch.bfloat16) for shape in ((48, 96), (48, 40), (8, 96))}
    assert fits == {(48, 96): True, (48, 40): False, (8, 96): False}
    assert not code_product.fits_fp8(torch.empty(48, 96), torch.float16)


def test_a_cpu_makes_ordinary_products():
    assert multiplying_codes() == set()


def test_forwards_that_record_no_gradient_are_the_same_in_every_way():
    block, batch = trainable_block(), random(2, 10, 48, dtype=torch.float32)
    prefix = tuple(random(2, 3, 16, seed=seed, dtype=torch.float32) for seed in (4, 5))
    with torch.no_grad():
        outputs = [(block.take_ways(ways), block(batch, prefix))[1] for ways in (OLDER, StepWays())]
    assert torch.equal(*outputs)


def test_the_defaults_are_what_has_been_measured():
    assert {each.name: each.default for each in fields(StepWays)} == {
        "attention": "padded",
        "code_products": True,
    }
