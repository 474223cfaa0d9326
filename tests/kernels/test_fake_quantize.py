import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hopper import spilled_on_hopper
from quantize_layouts import LAYOUTS, border_values, code_range, make_layout
from torch import Tensor

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.fake_quantize import fake_quantize, fake_quantize_with_codes

TESTS = Path(__file__).resolve().parents[1]
layouts = pytest.mark.parametrize("layout", LAYOUTS)
grids = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def through(x: Tensor, offset: Tensor | None = None) -> Tensor:
    """Rounding whose gradient is one; with `offset`, that of an earlier rounding."""
    return x + ((x.round() - x).detach() if offset is None else offset)


def surrogate(x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    z = torch.zeros_like(scale) if zero is None else through(zero)
    return (torch.clamp(through(x / scale) + z, low, high) - z) * scale


def leaves(layout: str, symmetric: bool) -> list[Tensor]:
    tensors = make_layout(layout, symmetric, torch.float64)
    return [each.requires_grad_() for each in tensors if each is not None]


def with_zero(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None


@layouts
@grids
def test_fake_quantize_follows_the_formula_in_float64(layout, symmetric):
    x, scale, zero = make_layout(layout, symmetric)
    low, high = code_range(symmetric)
    y = fake_quantize(x, scale, zero, low, high)
    ratio = x.double() / scale.double()
    z = 0 if zero is None else zero.double().round()
    wanted = (torch.clamp(ratio.round() + z, low, high) - z) * scale.double()
    decided = ((ratio - ratio.floor()) - 0.5).abs() > 1e-5  # float32 may round a near half to the other side
    assert decided.float().mean() > 0.99
    torch.testing.assert_close(y.double()[decided], wanted[decided], rtol=1e-6, atol=0)  # a float32 product
    double = fake_quantize(x.double(), scale.double(), None if zero is None else zero.double(), low, high)
    assert torch.equal(double, wanted)


@layouts
@grids
def test_fake_quantize_gradients_are_those_of_straight_through_rounding(layout, symmetric):
    tensors = leaves(layout, symmetric)
    low, high = code_range(symmetric)
    upstream = torch.randn(tensors[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(fake_quantize(*with_zero(tensors), low, high), tensors, upstream)
    wanted = torch.autograd.grad(surrogate(*with_zero(tensors), low, high), tensors, upstream)
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)  # float64 sums in another order


@layouts
@grids
def test_fake_quantize_gradients_are_finite_differences_with_rounding_frozen(layout, symmetric):
    x, scale, zero = make_layout(layout, symmetric, torch.float64)
    low, high = code_range(symmetric)
    z = torch.zeros_like(scale) if zero is None else zero.round()
    code = (x / scale).round() + z
    x = x - scale * (code == low) + scale * (code == high)  # off the kinks, where no derivative exists
    offset, zero_offset = (x / scale).round() - x / scale, z - (0 if zero is None else zero)

    def frozen(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        z = zero_offset if zero is None else through(zero, zero_offset)
        return (torch.clamp(through(x / scale, offset) + z, low, high) - z) * scale

    tensors = [each.requires_grad_() for each in (x.detach(), scale, zero) if each is not None]
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(fake_quantize(*with_zero(tensors), low, high), tensors, upstream)
    step = 1e-6
    for index, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        ends = []
        for sign in (1, -1):
            moved = [each.detach() for each in tensors]
            moved[index] = moved[index] + sign * step * direction
            ends.append((frozen(*moved) * upstream).sum())
        difference = (ends[0] - ends[1]) / (2 * step)
        # cancellation leaves about 1e-16 / 1e-6 of sums near 1e2
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-6)


@grids
def test_fake_quantize_beyond_the_range_trains_the_grid_and_not_x(symmetric):
    low, high = code_range(symmetric)
    scale = torch.tensor(0.5, requires_grad=True)
    zero = None if symmetric else torch.tensor(7.2, requires_grad=True)
    z = 0 if symmetric else 7
    for x_value, code in ((-100.0, low), (100.0, high)):
        x = torch.tensor([x_value], requires_grad=True)
        y = fake_quantize(x, scale, zero, low, high)
        assert y.item() == (code - z) * 0.5
        dx, dscale, *dzero = torch.autograd.grad(
            y, [x, scale] if zero is None else [x, scale, zero], torch.tensor([3.0])
        )
        assert dx.item() == 0
        assert dscale.item() == 3 * (code - z)
        assert [each.item() for each in dzero] == [] if symmetric else [-3 * 0.5]


def test_fake_quantize_rounds_halves_to_even_before_it_decides_on_the_range():
    x = torch.tensor([-9.5, -8.5, -7.5, -0.5, 0.5, 1.5, 6.5, 7.5], requires_grad=True)
    y = fake_quantize(x, torch.tensor(1.0), None, -8, 7)
    assert y.tolist() == [-8, -8, -8, 0, 0, 2, 6, 7]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]  # -8.5 rounds into the range, 7.5 out of it


def test_fake_quantize_saturates_huge_values_and_keeps_nan():
    y = fake_quantize(torch.tensor([3e38, -torch.inf, torch.inf, torch.nan]), torch.tensor(1.0), None, -8, 7)
    assert y[:3].tolist() == [7, -8, 7]
    assert y[3].isnan()


def test_fake_quantize_passes_the_gradient_on_through_a_scale_computed_from_x():
    x = make_layout("weight-groups", True, torch.float64)[0].requires_grad_()

    def scale_of(x: Tensor) -> Tensor:
        return 2 * x.abs().amax(-1, keepdim=True) / 15

    upstream = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    (ours,) = torch.autograd.grad(fake_quantize(x, scale_of(x), None, -8, 7), x, upstream)
    (wanted,) = torch.autograd.grad(surrogate(x, scale_of(x), None, -8, 7), x, upstream)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)  # float64 sums in another order
    (constant,) = torch.autograd.grad(fake_quantize(x, scale_of(x).detach(), None, -8, 7), x, upstream)
    assert not torch.allclose(ours, constant)


def test_fake_quantize_returns_the_asked_type_and_each_gradient_its_own():
    x, scale, zero = make_layout("tokens", False, torch.bfloat16)
    x, scale = x.requires_grad_(), scale.requires_grad_()
    assert fake_quantize(x, scale, zero, 0, 15).dtype == torch.bfloat16
    y = fake_quantize(x, scale, zero, 0, 15, torch.float32)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert (x.grad.dtype, scale.grad.dtype) == (torch.bfloat16, torch.float32)


def test_fake_quantize_is_not_changed_by_autocast():
    x, scale, zero = make_layout("weight-groups", False)
    tensors = [x.requires_grad_(), scale.requires_grad_()]
    plain = fake_quantize(x, scale, zero, 0, 15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = fake_quantize(x, scale, zero, 0, 15)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)
    for mine, theirs in zip(
        torch.autograd.grad(mixed.sum(), tensors), torch.autograd.grad(plain.sum(), tensors), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_fake_quantize_of_nothing_is_nothing():
    x = torch.zeros(0, 8, requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, None, -8, 7).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, "torch.int32"),
        ({"scale": torch.ones(4, 1, dtype=torch.int64)}, "torch.int64"),
        ({"scale": torch.ones(4, 8)}, "constant along its last axis"),
        ({"scale": torch.ones(1, 4, 1)}, "broadcasts against x"),
        ({"scale": torch.ones(3, 1)}, r"\(3, 1\) does not broadcast against x \(4, 8\)"),
        ({"zero_point": torch.zeros(1, 1)}, r"the scale's shape \(4, 1\), got \(1, 1\)"),
        ({"scale": torch.ones(4, 1, device="meta")}, "one device, got cpu, meta"),
        ({"low": 7, "high": 7}, "low < high, got 7 and 7"),
        ({"dtype": torch.int8}, "torch.int8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_fake_quantize_refuses_what_does_not_fit(change, said):
    arguments = {"x": torch.zeros(4, 8), "scale": torch.ones(4, 1), "zero_point": None, "low": -8, "high": 7}
    with pytest.raises(KernelInputError, match=said):
        fake_quantize(**{**arguments, **change})


def test_fake_quantize_gives_no_second_derivative():
    x = border_values()[:9].requires_grad_()
    y = fake_quantize(x * x, torch.tensor(1.0), None, -8, 7)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_fake_quantize_with_codes_is_fake_quantize_and_the_codes_of_its_result():
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = (torch.rand(6, 1, generator=torch.Generator().manual_seed(1)) + 0.1).requires_grad_()
    wanted = fake_quantize(x, scale, None, -8, 7, torch.bfloat16)
    y, codes = fake_quantize_with_codes(x, scale, -8, 7, torch.bfloat16)
    assert torch.equal(y, wanted)
    assert codes.dtype == torch.float8_e4m3fn
    assert not codes.requires_grad
    assert torch.equal((codes.float() * scale).bfloat16(), y)
    grad = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert all(map(torch.equal, *(torch.autograd.grad(each, (x, scale), grad) for each in (y, wanted))))


def test_fake_quantize_with_codes_refuses_codes_that_fp8_does_not_hold():
    with pytest.raises(KernelInputError, match="holds the codes from -16 to 16, got -128 to 127"):
        fake_quantize_with_codes(torch.ones(2, 16), torch.ones(2, 1), -128, 127)


def test_the_kernel_that_writes_codes_compiles_for_hopper(tmp_path):
    pytest.importorskip("triton")
    from prefixquant.kernels.fake_quantize.kernel import _forward_kernel

    types = ["*fp32", "*fp32", "*fp32", "*bf16", "*fp8e4nv", "i32", "i32", "i32", "i32"]
    constants = {"ZERO": False, "LOW": -8, "HIGH": 7, "CODES": True, "BR": 1, "BC": 4096}
    assert spilled_on_hopper(_forward_kernel, types, constants, {}, tmp_path) == 0


def test_fake_quantize_kernels_in_the_interpreter_match_the_reference():
    # Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
    script = Path(__file__).with_name("interpreted_fake_quantize.py")
    done = subprocess.run([sys.executable, script, TESTS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("matches") == 2 * len(LAYOUTS) + 4, done.stdout
