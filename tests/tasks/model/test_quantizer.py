from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.quantizer import (
    SiteQuantizer,
    code_range,
    fake_quantize,
    quantize,
    scale_from_range,
    weight_groups,
    weight_scale,
)
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, WeightSpec
from prefixquant.tasks.model.trainable import WeightQuantizer

HALF = 0.5 + 1e-4  # of a scale; float32 roundings on top
BITS = pytest.mark.parametrize("bits", range(2, 9))
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])

ACTIVATIONS = {
    "static-tensor": {},
    "static-group": {"granularity": "group", "group_size": 8},
    "dynamic-token": {"mode": "dynamic", "granularity": "token"},
    "dynamic-group": {"mode": "dynamic", "granularity": "group", "group_size": 8},
}
KEY_VALUES = {
    **ACTIVATIONS,
    "static-tensor": {"granularity": "tensor"},
    "static-head": {"granularity": "head"},
    "dynamic-head": {"mode": "dynamic", "granularity": "head"},
}


def skewed(*shape: int, seed: int = 0) -> Tensor:
    """Values whose ranges differ by channel, head and token and are not centred."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for axis in range(len(shape)):
        width = [size if index == axis else 1 for index, size in enumerate(shape)]
        x = x * torch.rand(width, generator=generator).add(0.2).mul(2) + 0.1 * torch.rand(width, generator=generator)
    return x


def sharing(x: Tensor, name: str) -> Tensor:
    """Return an activation [B, T, C] or keys [B, H, T, C] as [..., values that share a scale], spelled out by hand."""
    mode, granularity = name.split("-")
    if granularity == "tensor":
        return x.reshape(1, -1)
    if granularity == "token":
        return x.flatten(0, 1) if x.ndim == 3 else x.transpose(1, 2).flatten(2).flatten(0, 1)
    if granularity == "head":
        return x.flatten(0, 2) if mode == "dynamic" else x.transpose(0, 1).flatten(1)
    grouped = x.unflatten(-1, (-1, 8))
    if mode == "dynamic":
        return grouped.flatten(0, -2)
    return (
        grouped.permute(2, 0, 1, 3).flatten(1)
        if x.ndim == 3
        else grouped.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
    )


def calibrated(quantizer: SiteQuantizer, x: Tensor) -> SiteQuantizer:
    """Set a static quantizer to the range of x, as calibration does: channel ranges, then what shares a scale."""
    if quantizer.spec.mode == "static":
        dims = (0, 2) if quantizer.heads else (0, 1)
        quantizer.set_range(*quantizer.channel_range(x.amin(dims), x.amax(dims)))
    return quantizer


def check_site(spec: ActivationSpec | KeyValueSpec, x: Tensor, name: str, heads: int | None) -> None:
    quantizer = calibrated(SiteQuantizer(spec, x.shape[-1], heads), x)
    y = quantizer(x)
    assert y.shape == x.shape
    wanted, got = sharing(x, name), sharing(y, name)
    low, high = wanted.amin(-1, keepdim=True), wanted.amax(-1, keepdim=True)
    scale, _ = scale_from_range(low, high, spec.bits, spec.symmetric)
    assert ((got - wanted).abs() / scale).max() <= HALF
    assert max(len(row.unique()) for row in got) <= 2**spec.bits


@BITS
@SYMMETRY
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_error_is_at_most_half_a_scale_of_what_shares_it(bits, symmetric, name):
    spec = ActivationSpec(bits=bits, symmetric=symmetric, **ACTIVATIONS[name])
    check_site(spec, skewed(3, 5, 24), name, heads=None)


@BITS
@SYMMETRY
@pytest.mark.parametrize("name", KEY_VALUES)
def test_key_value_error_is_at_most_half_a_scale_of_what_shares_it(bits, symmetric, name):
    spec = KeyValueSpec(bits=bits, symmetric=symmetric, **KEY_VALUES[name])
    check_site(spec, skewed(3, 2, 5, 16), name, heads=2)


@BITS
@SYMMETRY
@pytest.mark.parametrize("grouping", [{"granularity": "tensor"}, {}, {"granularity": "group", "group_size": 8}])
def test_weight_error_is_at_most_half_a_scale_and_codes_stay_in_range(bits, symmetric, grouping):
    spec = WeightSpec(bits=bits, symmetric=symmetric, **grouping)
    weight = skewed(6, 24)
    groups = weight_groups(weight, spec)
    assert groups.shape == {"tensor": (1, 1, 144), "channel": (6, 1, 24), "group": (6, 3, 8)}[spec.granularity]
    scale, zero_point = weight_scale(weight, spec)
    codes = quantize(groups, scale, zero_point, bits, symmetric)
    low, high = code_range(bits, symmetric)
    assert (codes.min() >= low) & (codes.max() <= high)
    assert torch.equal(codes, codes.round())
    assert (((codes - zero_point) * scale - groups).abs() / scale).max() <= HALF


@BITS
def test_codes_have_the_documented_range(bits):
    assert code_range(bits, True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert code_range(bits, False) == (0, 2**bits - 1)


@BITS
@SYMMETRY
def test_codes_stay_in_range_far_outside_the_calibrated_range(bits, symmetric):
    scale, zero_point = scale_from_range(torch.tensor(-1.0), torch.tensor(2.0), bits, symmetric)
    codes = quantize(torch.tensor([-1e6, 1e6]), scale, zero_point, bits, symmetric)
    assert tuple(codes.tolist()) == code_range(bits, symmetric)


@BITS
@SYMMETRY
@pytest.mark.parametrize(("low", "high"), [(-0.7, 2.3), (0.4, 2.3), (-2.3, -0.4), (0.0, 0.0)])
def test_zero_is_exact(bits, symmetric, low, high):
    scale, zero_point = scale_from_range(torch.tensor(low), torch.tensor(high), bits, symmetric)
    assert scale > 0
    assert zero_point == zero_point.round()
    assert fake_quantize(torch.zeros(3), scale, zero_point, bits, symmetric).eq(0).all()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_heads_have_scales_of_their_own(mode):
    spec = KeyValueSpec(mode=mode)
    x = skewed(2, 3, 5, 16)
    louder = x.clone()
    louder[:, 1] *= 100
    y, changed = (calibrated(SiteQuantizer(spec, 16, 3), value)(value) for value in (x, louder))
    assert torch.equal(changed[:, (0, 2)], y[:, (0, 2)])
    torch.testing.assert_close(changed[:, 1], 100 * y[:, 1])


def test_one_scale_for_all_heads_follows_the_loudest():
    quantizer = SiteQuantizer(KeyValueSpec(granularity="tensor"), 16, 3)
    x = skewed(2, 3, 5, 16)
    x[:, 1] *= 100
    assert calibrated(quantizer, x).scale.shape == ()
    torch.testing.assert_close(quantizer.scale, 2 * x.abs().max() / 15)


def test_dynamic_tokens_do_not_influence_each_other():
    quantizer = SiteQuantizer(ActivationSpec(mode="dynamic", granularity="token"), 24)
    x = skewed(2, 5, 24)
    louder = x.clone()
    louder[:, 3] *= 1000
    assert torch.equal(quantizer(louder)[:, :3], quantizer(x)[:, :3])


def test_dynamic_clip_ratio_shrinks_the_grid_of_each_token():
    quantizer = SiteQuantizer(ActivationSpec(mode="dynamic", granularity="token"), 24)
    x = skewed(2, 5, 24)
    quantizer.clip_ratio.fill_(0.5)
    largest = x.abs().amax(-1)
    assert (quantizer(x).abs().amax(-1) <= largest * 0.5 * 16 / 15 * 1.0001).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_site_keeps_the_dtype(dtype):
    assert SiteQuantizer(ActivationSpec(), 24)(skewed(2, 5, 24).to(dtype)).dtype == dtype


def test_site_of_zeros_is_zero():
    for spec in (ActivationSpec(symmetric=False), ActivationSpec(mode="dynamic", granularity="token")):
        x = torch.zeros(2, 5, 24)
        assert calibrated(SiteQuantizer(spec, 24), x)(x).eq(0).all()


def test_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="group_size 9 does not divide the 24 channels"):
        SiteQuantizer(ActivationSpec(granularity="group", group_size=9), 24)
    with pytest.raises(ConfigError, match="group_size 9 does not divide the 24 inputs"):
        weight_scale(torch.ones(4, 24), WeightSpec(granularity="group", group_size=9))


class Frozen:
    """A site in float64 with every rounding replaced by what it added at one point, so that derivatives exist."""

    def __init__(self, quantizer: SiteQuantizer, x: Tensor) -> None:
        self.quantizer = quantizer
        self.bounds = code_range(quantizer.spec.bits, quantizer.spec.symmetric)
        y, scale, zero = self._grid(x, quantizer.state_dict())
        raw = (y / scale).round() + zero.round()
        self.inside = (raw >= self.bounds[0]) & (raw <= self.bounds[1])
        self.bound, self.offset, self.zero_offset = raw.clamp(*self.bounds), (y / scale).round() - y / scale, 0.0
        if quantizer.spec.mode == "static":
            self.zero_offset = zero.round() - zero

    def _grid(self, x: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        spec, y = self.quantizer.spec, self.quantizer.grouped(x)
        if spec.mode == "static":
            return y, values["scale"].double(), values["zero_point"].double()
        dims = (1, 3) if self.quantizer.heads and spec.granularity == "token" else (-1,)
        low, high = (bound(dims, keepdim=True) * values["clip_ratio"].double() for bound in (y.amin, y.amax))
        if spec.symmetric:
            scale = 2 * torch.maximum(low.abs(), high.abs()) / (2**spec.bits - 1)
            return y, scale, torch.zeros_like(scale)
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / (2**spec.bits - 1)
        return y, scale, (-low / scale).round()  # whole, and so without a gradient

    def __call__(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        y, scale, zero = self._grid(x, values)
        zero = zero + self.zero_offset
        code = torch.where(self.inside, y / scale + self.offset + zero, self.bound)
        return ((code - zero) * scale).reshape(x.shape)


SITES = [("activations", name) for name in ACTIVATIONS] + [("keys", name) for name in KEY_VALUES]


@SYMMETRY
@pytest.mark.parametrize(("kind", "name"), SITES, ids=lambda value: value)
def test_site_gradients_are_finite_differences_with_rounding_frozen(kind, name, symmetric):
    heads = 2 if kind == "keys" else None
    options = (KEY_VALUES if heads else ACTIVATIONS)[name]
    spec = (KeyValueSpec if heads else ActivationSpec)(symmetric=symmetric, **options)
    x = skewed(*((3, 2, 5, 16) if heads else (3, 5, 16))).double()
    quantizer = calibrated(SiteQuantizer(spec, 16, heads), x)
    for parameter, value in quantizer.named_buffers():
        # Narrow enough that values lie on either side of both ends of the range; a zero point between whole numbers.
        setattr(quantizer, parameter, value.double() + 0.2 if parameter == "zero_point" else 0.6 * value.double())
    names = [each for each, _ in quantizer.named_buffers() if each != "zero_point" or not symmetric]
    frozen, generator = Frozen(quantizer, x), torch.Generator().manual_seed(1)
    assert 0 < frozen.inside.double().mean() < 1
    values = quantizer.state_dict()
    leaves = {each: values[each].clone().requires_grad_() for each in names} | {"x": x.clone().requires_grad_()}
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y = torch.func.functional_call(quantizer, {each: leaves[each] for each in names}, (leaves["x"],))
    torch.testing.assert_close(y.detach(), frozen(x, values), rtol=1e-6, atol=1e-9)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    for (name_, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1e-6, -1e-6):
            moved = values | {"x": x, name_: leaf.detach() + sign * direction}
            ends.append((frozen(moved["x"], moved) * upstream).sum())
        # The range of a token, from which a dynamic scale comes, is taken in float32.
        tolerance = 1e-6 if spec.mode == "static" else 1e-4
        torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=tolerance, atol=1e-5)


@SYMMETRY
@pytest.mark.parametrize("grouping", [{"granularity": "tensor"}, {}, {"granularity": "group", "group_size": 8}])
def test_weight_gradients_are_finite_differences_with_rounding_frozen(symmetric, grouping):
    spec = WeightSpec(bits=3, symmetric=symmetric, **grouping)
    weight = skewed(6, 24).double()
    scale, zero = (each.double() for each in weight_scale(weight, spec, 0.6))
    quantizer = WeightQuantizer(spec, scale, zero if symmetric else zero + 0.2)
    groups, low_high = weight_groups(weight, spec), code_range(3, symmetric)
    raw = (groups / scale).round() + zero
    inside, offset, bound = (
        (raw >= low_high[0]) & (raw <= low_high[1]),
        raw - groups / scale - zero,
        raw.clamp(*low_high),
    )
    assert 0 < inside.double().mean() < 1

    def frozen(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        code = torch.where(inside, weight_groups(weight, spec) / scale + offset + zero, bound)
        return ((code - zero) * scale).reshape(weight.shape)

    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    leaves = [weight.clone().requires_grad_(), quantizer.scale, *([] if symmetric else [quantizer.zero_point])]
    gradients = torch.autograd.grad(quantizer(leaves[0]), leaves, upstream)
    at = [weight, scale, zero]
    for index, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = [
            (frozen(*(each + sign * direction if i == index else each for i, each in enumerate(at))) * upstream).sum()
            for sign in (1e-6, -1e-6)
        ]
        torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-6)
