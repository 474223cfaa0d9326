"""Activations to integer codes: static or per token, perhaps normalized first."""

import torch
from torch import Tensor

from prefixquant.kernels.dispatch import VALUE_TYPES_TEXT, call, takes_values, uses_triton
from prefixquant.kernels.errors import KernelInputError

from .reference import STORAGE, quantize_reference

__all__ = ["quantize"]


def quantize(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    clip_ratio: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    bits: int = 4,
    layout: str = "int4",
) -> tuple[Tensor, Tensor]:
    """Return (codes, scale): codes = clamp(round(x / scale), -2^(b-1), 2^(b-1) - 1), halves rounded to even.

    With `gain`, x is replaced by RMSNorm(x) * gain first, rounded to x's type (arXiv:1910.07467, equation 4).

    Args:
        x: [..., K], K even, last axis contiguous; float32, bfloat16 or float16, or float64 where the reference runs.
        scale: float32 scalar for all tokens; None: a scale a token, 2 clip_ratio max|x| / (2^b - 1), returned as
            [..., 1], float32 for every x.
        clip_ratio: float32 scalar; only without `scale`. None: 1.
        gain: [K] of x's type.
        eps: of the norm.
        bits: 4 or 8.
        layout: `int4`: uint8 [..., K / 2] of two codes (`kernels.int4`); `int8`; or `fp8`: each code a float8_e4m3fn,
            which holds 4-bit codes exactly.

    Raises:
        KernelInputError: types, shapes, strides, devices or the layout do not fit.
    """
    _check(x, scale, clip_ratio, gain, bits, layout)
    codes, scales = call(_quantize, x, scale, clip_ratio, gain, eps, bits, layout)
    return codes, scales if scale is None else scale


@torch.library.custom_op("prefixquant::quantize", mutates_args=())
def _quantize(
    x: Tensor,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    gain: Tensor | None,
    eps: float,
    bits: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Return codes, and the scales of tokens; none of these with a static scale."""
    if scale is None and clip_ratio is None:
        clip_ratio = torch.ones((), device=x.device)
    if uses_triton(x):
        from .kernel import quantize_triton

        with torch.cuda.device(x.device):  # Triton launches on the current device
            codes, scales = quantize_triton(x.reshape(-1, x.shape[-1]), scale, clip_ratio, gain, eps, bits, layout)
        codes = codes.view(*x.shape[:-1], -1)
    else:
        codes, scales = quantize_reference(x, scale, clip_ratio, gain, eps, bits, layout)
    return codes, scales.view(*x.shape[:-1], 1) if scale is None else scales.new_empty(0)


@_quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    gain: Tensor | None,
    eps: float,
    bits: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1] // 2 if layout == "int4" else x.shape[-1]
    codes = x.new_empty((*x.shape[:-1], columns), dtype=STORAGE[layout])
    return codes, x.new_empty((*x.shape[:-1], 1) if scale is None else (0,), dtype=torch.float32)


def _check(
    x: Tensor, scale: Tensor | None, clip_ratio: Tensor | None, gain: Tensor | None, bits: int, layout: str
) -> None:
    if not takes_values(x, x.dtype):
        raise KernelInputError(f"quantize needs {VALUE_TYPES_TEXT}, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] % 2 or x.stride(-1) != 1:
        raise KernelInputError(
            f"quantize needs [..., K] with K even and contiguous, got {tuple(x.shape)} with strides {x.stride()}"
        )
    if x.shape[-1] > 65536:
        raise KernelInputError(f"quantize holds a row at once, of 65536 columns at most, got {x.shape[-1]}")
    if layout not in STORAGE or bits not in (4, 8) or (bits == 8 and layout != "int8"):
        raise KernelInputError(
            f"quantize takes 4 bits as int4, int8 or fp8, and 8 bits as int8; got {bits} bits as {layout!r}"
        )
    if scale is not None and clip_ratio is not None:
        raise KernelInputError("quantize takes a static scale or a clip_ratio of per-token scales, not both")
    for name, value in (("scale", scale), ("clip_ratio", clip_ratio)):
        if value is not None and (value.numel() != 1 or value.dtype != torch.float32 or value.device != x.device):
            raise KernelInputError(
                f"quantize needs {name} as one float32 on {x.device}, got {tuple(value.shape)} {value.dtype} on "
                f"{value.device}"
            )
    if gain is not None and (gain.shape != x.shape[-1:] or gain.dtype != x.dtype or gain.device != x.device):
        raise KernelInputError(
            f"quantize needs gain [{x.shape[-1]}] as {x.dtype} on {x.device}, got {tuple(gain.shape)} {gain.dtype} on "
            f"{gain.device}"
        )
