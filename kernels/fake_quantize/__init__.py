"""Quantize and dequantize in one go, differentiable by straight-through estimation."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixquant.kernels.dispatch import uses_triton
from prefixquant.kernels.errors import KernelInputError

from .reference import backward_reference, codes_reference, forward_reference

__all__ = ["fake_quantize", "fake_quantize_gradients", "fake_quantize_with_codes"]


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (clamp(round(x / scale) + z, low, high) - z) * scale, z = round(zero_point) or 0; halves round to even.

    A NaN stays one, an infinite x saturates. The gradient takes rounding for the identity: x passes it on where the
    code is within range; scale gets the sum of grad * (code - z - x / scale), outside the range grad * (code - z);
    zero_point the sum of -grad * scale outside the range (LSQ, arXiv:1902.08153, equations 1 to 3, with a zero point as
    in LSQ+, arXiv:2004.09576). There is no second derivative.

    Args:
        x: floating point, any shape.
        scale: positive, broadcasts against x and does not vary along its last axis.
        zero_point: of the scale's shape, or None if the grid is symmetric.
        low: smallest code.
        high: largest code.
        dtype: of the result; None: x's. Arithmetic is in float32 (float64 for a float64 x).

    Raises:
        KernelInputError: types, shapes, devices or code range do not fit.
    """
    _check(x, scale, zero_point, low, high, dtype)
    if torch.compiler.is_compiling() and dtype not in (None, x.dtype) and scale.ndim == 0:
        traced: Tensor = _Traced.apply(x, scale, zero_point, low, high, dtype)
        return traced
    return _fake_quantize(x, scale, zero_point, low, high, dtype or x.dtype)


def fake_quantize_with_codes(
    x: Tensor, scale: Tensor, low: int, high: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return `fake_quantize(x, scale, None, low, high, dtype)` and its codes, without a gradient, as float8_e4m3fn.

    Raises:
        KernelInputError: as `fake_quantize`, and for codes beyond -16 to 16, up to where that type holds all of them.
    """
    _check(x, scale, None, low, high, dtype)
    if low < -16 or high > 16:
        raise KernelInputError(f"float8_e4m3fn holds the codes from -16 to 16, got {low} to {high}")
    y, codes = _fake_quantize_with_codes(x, scale, low, high, dtype or x.dtype)
    return y, codes.view(torch.float8_e4m3fn)


def fake_quantize_gradients(grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return the gradients for x and scale of `fake_quantize(x, scale, None, low, high)`."""
    dx, dscale, _ = _fake_quantize_backward(grad, x, scale, None, low, high, True, True, x.dtype)
    return dx, dscale


def _check(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, dtype: torch.dtype | None) -> None:
    if not x.is_floating_point() or not scale.is_floating_point():
        raise KernelInputError(f"fake_quantize needs floating-point x and scale, got {x.dtype} and {scale.dtype}")
    if dtype is not None and not dtype.is_floating_point:
        raise KernelInputError(f"fake_quantize returns floating-point values, got dtype {dtype}")
    if low >= high:
        raise KernelInputError(f"fake_quantize needs low < high, got {low} and {high}")
    if scale.ndim > x.ndim or (scale.ndim and scale.shape[-1] != 1):
        raise KernelInputError(
            f"fake_quantize needs a scale that broadcasts against x and is constant along its last axis, "
            f"got {tuple(scale.shape)} for {tuple(x.shape)}"
        )
    if any(mine not in (1, whole) for mine, whole in zip(scale.shape[::-1], x.shape[::-1], strict=False)):
        raise KernelInputError(f"scale {tuple(scale.shape)} does not broadcast against x {tuple(x.shape)}")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise KernelInputError(
            f"zero_point must have the scale's shape {tuple(scale.shape)}, got {tuple(zero_point.shape)}"
        )
    devices = {x.device, scale.device, *([] if zero_point is None else [zero_point.device])}
    if len(devices) > 1:
        raise KernelInputError(f"fake_quantize needs one device, got {', '.join(sorted(map(str, devices)))}")


@torch.library.custom_op("prefixquant::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    if not _uses_triton(x):
        return forward_reference(x, scale, zero_point, low, high, dtype).contiguous()
    from .kernel import forward_triton

    rows, scales, zeros = _rows(x, scale, zero_point)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        return forward_triton(rows, scales, zeros, low, high, dtype)[0].view(x.shape)


@_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("prefixquant::fake_quantize_backward", mutates_args=())
def _fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    needs_x: bool,
    needs_grid: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for x (in `dtype`), scale and zero point, each empty where it is not needed."""
    dx: Tensor | None
    dscale: Tensor | None
    dzero: Tensor | None
    if not _uses_triton(x):
        dx, dscale, dzero = backward_reference(grad, x, scale, zero_point, low, high, dtype)
    else:
        from .kernel import backward_triton

        rows, scales, zeros = _rows(x, scale, zero_point)
        with torch.cuda.device(x.device):
            dx, dscale, dzero = backward_triton(
                grad.contiguous().view(rows.shape), rows, scales, zeros, low, high,
                needs_x=needs_x, needs_grid=needs_grid, dtype=dtype,
            )  # fmt: skip
        dx = None if dx is None else dx.view(x.shape)
        dscale, dzero = (_folded(each, x, scale) for each in (dscale, dzero))
    return (
        x.new_empty(0, dtype=dtype) if dx is None or not needs_x else dx.contiguous(),
        scale.new_empty(0) if dscale is None or not needs_grid else dscale.contiguous(),
        scale.new_empty(0) if dzero is None or not needs_grid or zero_point is None else dzero.contiguous(),
    )


@_fake_quantize_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    needs_x: bool,
    needs_grid: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,), dtype=dtype),
        scale.new_empty(scale.shape if needs_grid else (0,)),
        scale.new_empty(scale.shape if needs_grid and zero_point is not None else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.low, ctx.high, _ = inputs
    ctx.save_for_backward(x, scale, zero_point)
    ctx.keeps_dtype = x.is_leaf and x.grad_dtype is None


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    needs_x, needs_scale, needs_zero = ctx.needs_input_grad[:3]
    dx, dscale, dzero = _fake_quantize_backward(
        grad, x, scale, zero_point, ctx.low, ctx.high, needs_x, needs_scale or needs_zero,
        grad.dtype if ctx.keeps_dtype else x.dtype,
    )  # fmt: skip
    return dx if needs_x else None, dscale if needs_scale else None, dzero if needs_zero else None, None, None, None


_fake_quantize.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("prefixquant::fake_quantize_with_codes", mutates_args=())
def _fake_quantize_with_codes(
    x: Tensor, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the result, and the bytes of the codes: whole numbers take no gradient."""
    if not _uses_triton(x):
        codes = codes_reference(x, scale, low, high).to(torch.float8_e4m3fn).contiguous()
        return forward_reference(x, scale, None, low, high, dtype).contiguous(), codes.view(torch.uint8)
    from .kernel import forward_triton

    rows, scales, _ = _rows(x, scale, None)
    with torch.cuda.device(x.device):
        y, found = forward_triton(rows, scales, None, low, high, dtype, torch.float8_e4m3fn)
    assert found is not None
    return y.view(x.shape), found.view(x.shape).view(torch.uint8)


@_fake_quantize_with_codes.register_fake
def _(x: Tensor, scale: Tensor, low: int, high: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=torch.uint8)


def _save_with_codes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, low, high, dtype = inputs
    _save(ctx, (x, scale, None, low, high, dtype), output[0])


@once_differentiable
def _backward_with_codes(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, scale, _ = ctx.saved_tensors
    needs_x, needs_scale = ctx.needs_input_grad[:2]
    dx, dscale, _ = _fake_quantize_backward(
        grad, x, scale, None, ctx.low, ctx.high, needs_x, needs_scale, grad.dtype if ctx.keeps_dtype else x.dtype
    )
    return dx if needs_x else None, dscale if needs_scale else None, None, None, None


_fake_quantize_with_codes.register_autograd(_backward_with_codes, setup_context=_save_with_codes)


class _Traced(torch.autograd.Function):
    """The references, for torch.compile to merge with what makes x.

    A float32 x under autocast comes from a norm, and an operator of its own would have it written and read once more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, dtype: Any) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high = low, high
        return forward_reference(x, scale, zero_point, low, high, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        dx, dscale, dzero = backward_reference(grads[0], x, scale, zero_point, ctx.low, ctx.high)
        return dx, dscale, None if zero_point is None else dzero, None, None, None


def _span(x: Tensor, scale: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the scale's shape filled up to x's between its first and last varying axis, and the axis after these."""
    full = (1,) * (x.ndim - scale.ndim) + tuple(scale.shape)
    varying = [axis for axis, size in enumerate(full) if size > 1]
    first, end = (varying[0], varying[-1] + 1) if varying else (0, 0)
    return full[:first] + tuple(x.shape[first:end]) + full[end:], end


def _rows(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x as rows [R, C], and contiguous float32 scales and zero points [NUM]; number r % NUM is row r's."""
    shape, end = _span(x, scale)
    grids = [scale] if zero_point is None else [scale, zero_point]
    flat = [each.detach().expand(shape).float().contiguous().view(-1) for each in grids]
    rows = x.contiguous().view(-1, math.prod(x.shape[end:]))
    return rows, flat[0], None if zero_point is None else flat[1]


def _folded(grad: Tensor | None, x: Tensor, scale: Tensor) -> Tensor | None:
    """Return the gradient [NUM] of what `_rows` returned in the shape and type of the scale."""
    return None if grad is None else grad.view(_span(x, scale)[0]).sum_to_size(scale.shape).to(scale.dtype)


def _uses_triton(x: Tensor) -> bool:
    return uses_triton(x) and x.dtype != torch.float64 and x.numel() > 0
