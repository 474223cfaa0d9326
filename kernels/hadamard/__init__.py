"""Orthonormal Hadamard transform of the last axis, perhaps fused with what stands around it in a model."""

import torch
from torch import Tensor

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.quantize.reference import STORAGE

from .reference import hadamard_factors, hadamard_quantize_reference
from .training import hadamard_fake_quantize, hadamard_transform, has_triton

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
    bits: int = 4,
    layout: str = "int8",
) -> tuple[Tensor, Tensor]:
    """Return codes and scale of `hadamard_transform(x)`, or of `hadamard_transform(silu(x) * up)`.

    Every step is rounded to x's type as it would be on its own; codes and scale are those of `kernels.quantize`.

    Args:
        x: [..., n] contiguous, float32, bfloat16 or float16.
        up: of x's shape and type; x then is the gate of a SwiGLU (arXiv:2002.05202, equation 6).
        scale: float32 scalar; None: a scale a token.
        clip_ratio: float32 scalar, only without `scale`.
        bits: 4 or 8.
        layout: `int8`, or for 4 bits `fp8` (float8_e4m3fn).

    Raises:
        KernelInputError: types, shapes, devices or the layout do not fit, or n has no known Hadamard matrix.
    """
    _check(x, up, scale, clip_ratio, bits, layout)
    codes, scales = _hadamard_quantize(x, up, scale, clip_ratio, bits, layout)
    return codes, scales if scale is None else scale


@torch.library.custom_op("prefixquant::hadamard_quantize", mutates_args=())
def _hadamard_quantize(
    x: Tensor, up: Tensor | None, scale: Tensor | None, clip_ratio: Tensor | None, bits: int, layout: str
) -> tuple[Tensor, Tensor]:
    """Return codes, and the scales of tokens; none of these with a static scale."""
    hadamard_factors(x.shape[-1])  # here, where torch.compile does not look for the table of matrices
    if scale is None and clip_ratio is None:
        clip_ratio = torch.ones((), device=x.device)
    if _fits_kernel(x):
        from .kernel import hadamard_triton

        rows = x.view(-1, x.shape[-1])
        with torch.cuda.device(x.device):  # Triton launches on the current device
            codes, found = hadamard_triton(
                rows, None if up is None else up.view(rows.shape), scale, clip_ratio, bits=bits, codes=STORAGE[layout]
            )
        assert found is not None
        codes, scales = codes.view(x.shape), found
    else:
        codes, scales = hadamard_quantize_reference(x, up, scale, clip_ratio, bits, layout)
    return codes, scales.view(*x.shape[:-1], 1) if scale is None else scales.new_empty(0)


@_hadamard_quantize.register_fake
def _(
    x: Tensor, up: Tensor | None, scale: Tensor | None, clip_ratio: Tensor | None, bits: int, layout: str
) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=STORAGE[layout])
    return codes, x.new_empty((*x.shape[:-1], 1) if scale is None else (0,), dtype=torch.float32)


def _fits_kernel(x: Tensor) -> bool:
    if not (x.is_cuda and has_triton()):
        return False
    from .kernel import fits

    return fits(x.shape[-1])


def _check(
    x: Tensor, up: Tensor | None, scale: Tensor | None, clip_ratio: Tensor | None, bits: int, layout: str
) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not x.is_contiguous() or x.ndim < 2:
        raise KernelInputError(
            f"hadamard_quantize needs contiguous [..., n] in float32, bfloat16 or float16, got {tuple(x.shape)} "
            f"{x.dtype} with strides {x.stride()}"
        )
    if up is not None and (
        up.shape != x.shape or up.dtype != x.dtype or up.device != x.device or not up.is_contiguous()
    ):
        raise KernelInputError(
            f"up must be contiguous and like x, {tuple(x.shape)} {x.dtype}, got {tuple(up.shape)} {up.dtype}"
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
