"""What of a block is trained, that gradients reach it as stated, and what is stored of it."""

import pytest
import tiny
import torch

from prefixquant.tasks.model.quantizer import MIN_SCALE, round_to_nearest
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.model.trainable import make_trainable, trained_norms, trained_sites, trained_weights
from prefixquant.tasks.rotate import RotateConfig

ASYMMETRIC = QuantizeConfig(
    weights=WeightSpec(bits=3, symmetric=False, granularity="group", group_size=16),
    activations=ActivationSpec(symmetric=False),
    keys=KeyValueSpec(symmetric=False),
    values=KeyValueSpec(symmetric=False),
)
DYNAMIC = QuantizeConfig(
    activations=ActivationSpec(mode="dynamic", granularity="token"),
    keys=KeyValueSpec(mode="dynamic"),
    values=KeyValueSpec(mode="dynamic"),
)
CASES = {"static": QuantizeConfig(), "asymmetric": ASYMMETRIC, "dynamic": DYNAMIC}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(quantize, variant="llama-biases"):
    """Return a trainable block and its parameters; sites have plausible grids."""
    block = tiny.build_blocks(tiny.tiny_variant(variant), RotateConfig(), quantize)[0]
    for name, site in block.sites.items():
        quantizer = site.quantizer
        if quantizer.spec.mode == "static":
            shape = quantizer.parameter_shape()
            top = 0.01 if name in ("o_input", "down_input") else 0.1  # what enters these is small
            quantizer.set_range(torch.full(shape, -top), torch.full(shape, 0.8 * top))
        else:
            quantizer.clip_ratio.fill_(0.7)
    weights = {role: block.linear(role).weight.data.clone() for role in block.family.linears}
    grids = {role: round_to_nearest(weight, quantize.weights, 0.8) for role, weight in weights.items()}
    return block, make_trainable(block, weights, grids, quantize.weights)


@pytest.mark.parametrize("variant", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("quantize", CASES.values(), ids=CASES.keys())
def test_gradients_reach_every_parameter(quantize, variant):
    block, trainables = make(quantize, variant)
    block(random(2, 9, 48), None).square().mean().backward()
    for each in trainables:
        assert each.parameter.grad is not None, each.name
        assert bool(torch.isfinite(each.parameter.grad).all()), each.name
        assert float(each.parameter.grad.abs().max()) > 0, each.name
        assert each.step > 0, each.name
    assert len({each.name for each in trainables}) == len(trainables)
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    rest = [names[id(p)] for p in block.parameters() if all(p is not each.parameter for each in trainables)]
    assert all(name.endswith("bias") or "q_norm" in name or "k_norm" in name for name in rest)


def test_a_weight_quantizers_gradients_are_finite_differences_of_its_straight_through_surrogate():
    spec = WeightSpec(bits=3, symmetric=False, granularity="group", group_size=16)
    block, _ = make(QuantizeConfig(weights=spec))
    quantizer, weight = block.linear("mlp.down_proj").weight_quantizer.double(), random(48, 96).double() * 0.1
    scale, zero = quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone()
    groups = weight.reshape(48, -1, 16)
    upstream = random(48, 96, seed=1).double()
    offset = (groups / scale).round() - groups / scale  # rounding is taken for adding this constant
    raw = (groups / scale).round() + zero.round()
    inside = (raw >= 0) & (raw <= 7)
    bound = raw.clamp(0, 7)

    def surrogate(scale, zero):
        z = zero.round() + (zero - zero.round()).detach() + (zero - zero.detach())
        code = torch.where(inside, groups / scale + offset + z, bound)
        return (((code - z) * scale).reshape(48, 96) * upstream).sum()

    leaf = weight.clone().requires_grad_()
    (quantizer(leaf) * upstream).sum().backward()
    assert torch.equal(leaf.grad.reshape(48, -1, 16), torch.where(inside, upstream.reshape(48, -1, 16), 0.0))
    eps = 1e-6
    for row in range(3):
        step = torch.zeros_like(scale)
        step[row, 1] = eps
        numeric = (surrogate(scale + step, zero) - surrogate(scale - step, zero)) / (2 * eps)
        assert float(quantizer.scale.grad[row, 1]) == pytest.approx(float(numeric), rel=1e-6, abs=1e-7)
    wanted = torch.where(inside, 0.0, -upstream.reshape(48, -1, 16) * scale).sum(-1, keepdim=True)
    torch.testing.assert_close(quantizer.zero_point.grad, wanted)


def test_a_clipping_ratios_gradient_is_the_finite_difference_of_its_surrogate():
    block, _ = make(DYNAMIC)
    quantizer = block.sites["down_input"].quantizer.double()
    x, upstream = random(3, 5, 96).double(), random(3, 5, 96, seed=1).double()
    (quantizer(x) * upstream).sum().backward()
    found = float(quantizer.clip_ratio.grad)
    ratio = float(quantizer.clip_ratio.detach())
    span = 2 * x.abs().amax(-1, keepdim=True) / 15
    scale = ratio * span
    raw = (x / scale).round()
    inside, offset = (raw >= -8) & (raw <= 7), raw - x / scale

    def surrogate(ratio):
        code = torch.where(inside, x / (ratio * span) + offset, raw.clamp(-8, 7))
        return float((code * ratio * span * upstream).sum())

    # Scales are computed in float32, hence the tolerance.
    assert found == pytest.approx((surrogate(ratio + 1e-6) - surrogate(ratio - 1e-6)) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("quantize", CASES.values(), ids=CASES.keys())
def test_what_is_stored_computes_what_was_trained(quantize):
    block, _ = make(quantize)
    x = random(2, 9, 48)
    with torch.no_grad():
        trained = block(x, None)
        stored = trained_weights(block, quantize.weights)
        for role, weight in stored.items():
            linear = block.linear(role)
            assert torch.equal(linear.weight_quantizer(linear.weight), weight.dequantize(quantize.weights))
            linear.weight_quantizer, linear.weight.data = None, weight.dequantize(quantize.weights)
        torch.testing.assert_close(block(x, None), trained)
    norms = trained_norms(block)
    assert list(norms) == [f"{role}.weight" for role in (block.family.norm1, block.family.norm2)]


def test_scales_are_stored_positive_and_zero_points_whole_and_in_range():
    block, trainables = make(ASYMMETRIC)
    with torch.no_grad():
        for each in trainables:
            if each.name.endswith("scale"):
                each.parameter.fill_(-1.0)
            if each.name.endswith("zero_point"):
                each.parameter.fill_(99.7)
    for parameters in trained_sites(block).values():
        assert bool((parameters["scale"] == MIN_SCALE).all())
        assert bool((parameters["zero_point"] == 15).all())
    for weight in trained_weights(block, ASYMMETRIC.weights).values():
        assert bool((weight.scale == MIN_SCALE).all())
        assert bool((weight.zero_point == 7).all())
