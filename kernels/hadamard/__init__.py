"""Orthonormal Hadamard transform of the last axis, perhaps fused with what stands around it in a model."""

import torch
from torch import Tensor

from prefixquant.kernels.dispatch import VALUE_TYPES_TEXT, call, takes_values, uses_triton
from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.quantize.reference import STORAGE

from .reference import hadamard_factors, hadamard_quantize_reference
from .training import hadamard_fake_quantize, hadamard_transform

__all__ = ["hadamard_factors", "hadamard_fake_quantize", "hadamard_quantize", "hadamard_transform", "has_hadamard"]


def has_hadamard(n: int) -> bool:
    """Return whether an orthonormal Hadamard matrix of order n can be built."""
    try:
        hadamard_factors(n)
    except KernelInputError:
        return False
    return True


def hadamard_quantize(
    x: Tensor,
    up: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    clip_ratio: Tensor | None = None,
    channel_scale: Tensor | None = None,
    bits: int = 4,
    layout: str = "int8",
) -> tuple[Tensor, Tensor]:
    """Return codes and scale of `hadamard_transform(x)`, or of `hadamard_transform(silu(x) * up)`.

    Every step is rounded to x's type as it would be on its own; codes and scale are those of `kernels.quantize`.

    Args:
        x: [..., n], last axis contiguous, float32, bfloat16 or float16, or float64 where the reference runs.
        up: of x's shape and type; x then is the gate of a SwiGLU (arXiv:2002.05202, equation 6).
        scale: float32 scalar; None: a scale a token.
        clip_ratio: float32 scalar, only without `scale`.
        channel_scale: float32 [n], or [2 n] with `up`: what x, then up, is multiplied by first
            (`kernels.gemm.quantized_products` leaves it to do).
        bits: 4 or 8.
        layout: `int8`, or for 4 bits `fp8` (float8_e4m3fn).

    Raises:
        KernelInputError: types, shapes, devices or the layout do not fit, or n has no known Hadamard matrix.
    """
    _check(x, up, scale, clip_ratio, channel_scale, bits, layout)
    codes, scales = call(_hadamard_quantize, x, up, scale, clip_ratio, channel_scale, bits, layout)
    return codes, scales if scale is None else scale


@torch.library.custom_op("prefixquant::hadamard_quantize", mutates_args=())
def _hadamard_quantize(
    x: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    channel_scale: Tensor | None,
    bits: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Return codes, and the scales of tokens; none of these with a static scale."""
    hadamard_factors(x.shape[-1])  # here, where torch.compile does not look for the table of matrices
    if scale is None and clip_ratio is None:
        clip_ratio = torch.ones((), device=x.device)
    if _fits_kernel(x):
        from .kernel import hadamard_triton

        n = x.shape[-1]
        rows, more = x.reshape(-1, n), None if up is None else up.reshape(-1, n)
        with torch.cuda.device(x.device):  # Triton launches on the current device
            codes, found = hadamard_triton(
                rows, more, scale, clip_ratio, channel_scale, bits=bits, codes=STORAGE[layout]
            )
        assert found is not None
        codes, scales = codes.view(x.shape), found
    else:
        codes, scales = hadamard_quantize_reference(x, up, scale, clip_ratio, channel_scale, bits, layout)
    return codes, scales.view(*x.shape[:-1], 1) if scale is None else scales.new_empty(0)


@_hadamard_quantize.register_fake
def _(
    x: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    channel_scale: Tensor | None,
    bits: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=STORAGE[layout])
    return codes, x.new_empty((*x.shape[:-1], 1) if scale is None else (0,), dtype=torch.float32)


def _fits_kernel(x: Tensor) -> bool:
    if not uses_triton(x):
        return False
    from .kernel import fits

    return fits(x.shape[-1], x.dtype)


def _check(
    x: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    channel_scale: Tensor | None,
    bits: int,
    layout: str,
) -> None:
    if not takes_values(x, x.dtype) or x.ndim < 2 or x.stride(-1) != 1:
        raise KernelInputError(
            f"hadamard_quantize needs [..., n] in {VALUE_TYPES_TEXT}, the last axis contiguous, got "
            f"{tuple(x.shape)} {x.dtype} with strides {x.stride()}"
        )
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype or up.device != x.device or up.stride(-1) != 1):
        raise KernelInputError(
            f"up must be like x, {tuple(x.shape)} {x.dtype}, the last axis contiguous, got {tuple(up.shape)} "
            f"{up.dtype} with strides {up.stride()}"
        )
    channels = x.shape[-1] * (1 if up is None else 2)
    if channel_scale is not None and (
        channel_scale.shape != (channels,)
        or channel_scale.dtype != torch.float32
        or channel_scale.device != x.device
        or not channel_scale.is_contiguous()
    ):
        raise KernelInputError(
            f"channel_scale must be float32 [{channels}] on {x.device}, got {tuple(channel_scale.shape)} "
            f"{channel_scale.dtype} on {channel_scale.device}"
        )
    if layout not in ("int8", "fp8") or bits not in (4, 8) or (bits == 8 and layout == "fp8"):
        raise KernelInputError(f"hadamard_quantize takes int8 of 4 or 8 bits or fp8 of 4, got {bits} as {layout!r}")
    if scale is not None and clip_ratio is not None:
        raise KernelInputError("hadamard_quantize takes a static scale or a clip_ratio of per-token scales, not both")
    for name, value in (("scale", scale), ("clip_ratio", clip_ratio)):
        if value is not None and (value.shape != () or value.dtype != torch.float32 or value.device != x.device):
            raise KernelInputError(
                f"{name} must be a float32 scalar on {x.device}, "
                f"got {tuple(value.shape)} {value.dtype} on {value.device}"
            )
