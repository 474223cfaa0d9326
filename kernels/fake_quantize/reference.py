"""Fake quantization with straight-through gradients, in plain PyTorch: the truth, and the path on the CPU."""

import torch
from torch import Tensor


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x / scale, the codes minus the zero point, and where the code was within range."""
    kind = torch.promote_types(x.dtype, torch.float32)
    ratio = x.to(kind) / scale.to(kind)
    rounded = torch.round(ratio)
    if zero_point is None:
        return ratio, rounded.clamp(low, high), (rounded >= low) & (rounded <= high)
    zero = torch.round(zero_point.to(kind))
    rounded = rounded + zero
    return ratio, rounded.clamp(low, high) - zero, (rounded >= low) & (rounded <= high)


def forward_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """Return (clamp(round(x / scale) + z, low, high) - z) * scale in `dtype`."""
    _, centred, _ = _codes(x, scale, zero_point, low, high)
    return (centred * scale.to(centred.dtype)).to(dtype)


def codes_reference(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return clamp(round(x / scale), low, high), whole numbers in float32 or float64."""
    return _codes(x, scale, None, low, high)[1]


def backward_reference(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: int,
    high: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for x (in `dtype` or else x's), scale and zero point (whether or not there is one)."""
    ratio, centred, inside = _codes(x, scale, zero_point, low, high)
    grad = grad.to(ratio.dtype)
    dx = torch.where(inside, grad, 0)
    # Rows first: a compiled norm in front then makes these sums in the same pass as its own.
    dscale = (grad * (centred - torch.where(inside, ratio, 0))).sum(-1, keepdim=True).sum_to_size(scale.shape)
    dzero = torch.where(inside, 0, -grad * scale.to(ratio.dtype)).sum(-1, keepdim=True).sum_to_size(scale.shape)
    return dx.to(dtype or x.dtype), dscale.to(scale.dtype), dzero.to(scale.dtype)
