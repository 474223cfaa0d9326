"""Every way of a training step computes the same step."""

from dataclasses import fields

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from prefixquant.kernels.fake_quantize import fake_quantize, fake_quantize_with_codes
from prefixquant.tasks.losses import mse
from prefixquant.tasks.model.code_product import code_product
from prefixquant.tasks.model.modules import attention
from prefixquant.tasks.model.quantizer import round_to_nearest
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.trainable import make_trainable
from prefixquant.tasks.model.ways import StepWays
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.train_block import BlockLoss

WAYS = {
    "padded": StepWays(attention="padded"),
    "cudnn": StepWays(attention="cudnn"),
    "code-products": StepWays(code_products=True),
    "all": StepWays(attention="cudnn", code_products=True),
}


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
    y = code_product(*rounded, codes, x_scale, scale)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-6)  # F.linear starts from rounded factors
    grad = random(*y.shape, seed=3).bfloat16()
    for mine, theirs in zip(
        torch.autograd.grad(y, rounded, grad), torch.autograd.grad(F.linear(*rounded), rounded, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def step(ways, prefix_tokens, precision, compiled=True):
    """Return the loss and every gradient of a tiny block's step; compiled: as traced, without generated code."""
    quantize = QuantizeConfig()
    block = tiny.build_blocks(tiny.tiny_variant("llama"), RotateConfig(), quantize)[0]
    for site in block.sites.values():
        site.quantizer.scale.fill_(0.4)
    weights = {role: block.linear(role).weight.data.clone() for role in block.family.linears}
    grids = {role: round_to_nearest(weight, quantize.weights, 0.7) for role, weight in weights.items()}
    for each in make_trainable(block, weights, grids, quantize.weights):
        each.parameter.requires_grad_(True)
    block.take_ways(ways)
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


@pytest.mark.parametrize("prefix_tokens", [0, 3])
@pytest.mark.parametrize("name", WAYS)
def test_a_compiled_step_is_the_same_in_every_way(name, prefix_tokens):
    loss, wanted = step(StepWays(), prefix_tokens, "fp32")
    found_loss, found = step(WAYS[name], prefix_tokens, "fp32")
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == wanted.keys()
    for each, value in wanted.items():
        torch.testing.assert_close(found[each], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()), msg=each)


def test_a_step_under_autocast_is_in_no_way_further_from_the_step_in_float32():
    exact_loss, exact = step(StepWays(), 3, "fp32")
    loss, default = step(StepWays(), 3, "bf16")
    found_loss, found = step(WAYS["all"], 3, "bf16")
    assert abs(found_loss - exact_loss) < 1.25 * abs(loss - exact_loss)
    for name, value in exact.items():
        if value.ndim == 2:  # a value on the border of two codes falls to either side, and is worth a step of 4 bits
            far, wanted = ((each[name] - value).norm() / value.norm() for each in (found, default))
            assert far < 1.25 * wanted + 0.01, name


def test_a_step_that_is_not_compiled_goes_through_the_forward_of_every_linear():
    plain, wanted = step(StepWays(), 3, "fp32", compiled=False)
    mine, found = step(StepWays(code_products=True), 3, "fp32", compiled=False)
    assert torch.equal(mine, plain)
    assert all(torch.equal(found[each], value) for each, value in wanted.items())


def test_the_defaults_are_what_has_been_measured():
    assert {each.name: each.default for each in fields(StepWays)} == {
        "attention": "lower_right",
        "code_products": False,
    }
