"""Times fake quantization against the reference on one GPU: `python -m prefixquant.kernels.fake_quantize.bench`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]  # has no types
from torch import Tensor

from prefixquant.kernels.timing import median_ms

from . import fake_quantize
from .reference import backward_reference, forward_reference

LOW, HIGH = -8, 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call as training makes it; shapes of the MLP of Llama-3-8B (arXiv:2407.21783, table 3)."""

    name: str
    """What is quantized."""

    shape: tuple[int, int]
    """Of x."""

    scale_shape: tuple[int, ...]
    """Of the scale."""

    dtype: torch.dtype
    """Of x; the result is bfloat16."""


CASES = (
    Case(name="weight, scale a row", shape=(14336, 4096), scale_shape=(14336, 1), dtype=torch.float32),
    Case(name="activations, static scale", shape=(4096, 14336), scale_shape=(), dtype=torch.bfloat16),
    Case(name="activations, scale a row", shape=(4096, 14336), scale_shape=(4096, 1), dtype=torch.bfloat16),
)


def main() -> None:
    """Print a line for every case, forward alone and with the backward."""
    if not torch.cuda.is_available():
        raise SystemExit("fake_quantize.bench needs a CUDA GPU, found none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("medians; GB/s of the bytes that must move: inputs read once, results written once")
    for case in CASES:
        x, scale, grad = _inputs(case)
        problem = _difference(x, scale, grad)
        if problem is not None:
            print(f"{case.name}: {problem}; not timed")
            continue
        leaves = [x.requires_grad_(), scale.requires_grad_()]
        forward_bytes = x.nbytes + grad.nbytes  # grad is as large as the result

        def forward(x: Tensor = x, scale: Tensor = scale) -> None:
            with torch.no_grad():
                fake_quantize(x, scale, None, LOW, HIGH, torch.bfloat16)

        def both(x: Tensor = x, scale: Tensor = scale, grad: Tensor = grad, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(fake_quantize(x, scale, None, LOW, HIGH, torch.bfloat16), leaves, grad)

        def forward_plain(x: Tensor = x, scale: Tensor = scale) -> None:
            with torch.no_grad():
                forward_reference(x, scale, None, LOW, HIGH, torch.bfloat16)

        def both_plain(x: Tensor = x, scale: Tensor = scale, grad: Tensor = grad) -> None:
            with torch.no_grad():
                forward_reference(x, scale, None, LOW, HIGH, torch.bfloat16)
                backward_reference(grad, x, scale, None, LOW, HIGH)

        _report(f"{case.name}, forward", forward, forward_plain, forward_bytes)
        _report(f"{case.name}, forward + backward", both, both_plain, 2 * forward_bytes + x.nbytes)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, the scale and a gradient of the result, about one value in a thousand out of range."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(case.shape, device="cuda", generator=generator)
    scale = 0.4 + 0.1 * torch.rand(case.scale_shape, device="cuda", generator=generator)
    grad = torch.randn(case.shape, device="cuda", generator=generator, dtype=torch.bfloat16)
    return x.to(case.dtype), scale, grad


def _difference(x: Tensor, scale: Tensor, grad: Tensor) -> str | None:
    """Return where the operator leaves the reference, or None."""
    x_leaf, scale_leaf = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = fake_quantize(x_leaf, scale_leaf, None, LOW, HIGH, torch.bfloat16)
    if not torch.equal(y, forward_reference(x, scale, None, LOW, HIGH, torch.bfloat16)):
        return "the forward differs from the reference"
    dx, dscale = torch.autograd.grad(y, [x_leaf, scale_leaf], grad)
    dx_wanted, dscale_wanted, _ = backward_reference(grad, x, scale, None, LOW, HIGH)
    if not torch.equal(dx, dx_wanted):
        return "the gradient of x differs from the reference"
    # Sums of terms of either sign: their float32 error goes with the root of the count, not with the result.
    allowed = 1e-5 * (x.numel() / scale.numel()) ** 0.5
    error = (dscale - dscale_wanted).abs().max().item()
    if not error <= allowed:
        return f"the gradient of the scale is off by {error:.2g}, allowed {allowed:.2g}"
    return None


def _report(name: str, ours: Callable[[], None], plain: Callable[[], None], num_bytes: int) -> None:
    ms, plain_ms = (median_ms(call, rounds=30, warmup=5) for call in (ours, plain))
    print(f"{name}: {ms:.3f} ms, {num_bytes / ms / 1e6:.0f} GB/s, {plain_ms / ms:.1f} times as fast as the reference")


if __name__ == "__main__":
    main()
