"""Orthonormal Hadamard transform of the last axis, perhaps fused with what stands around it in a model."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.fake_quantize import fake_quantize, fake_quantize_gradients
from prefixquant.kernels.quantize.reference import STORAGE

from .reference import hadamard_factors, hadamard_quantize_reference, hadamard_transform_reference

__all__ = ["hadamard_factors", "hadamard_fake_quantize", "hadamard_quantize", "hadamard_transform", "has_hadamard"]


def has_hadamard(n: int) -> bool:
    """Return whether an orthonormal Hadamard matrix of order n can be built."""
    try:
        hadamard_factors(n)
    except KernelInputError:
        return False
    return True


def hadamard_transform(x: Tensor) -> Tensor:
    """Return x @ H, H the orthonormal Hadamard matrix of the last axis' size; under autocast in its type, as a product.

    Args:
        x: [..., n] floating point, n with a known order (`hadamard_factors`).

    Raises:
        KernelInputError: x is not floating point, or n has no known Hadamard matrix.
    """
    if not x.is_floating_point():
        raise KernelInputError(f"hadamard_transform needs a floating-point tensor, got {x.dtype}")
    return _hadamard_transform(_as_product_reads(x), False)


@torch.library.custom_op("prefixquant::hadamard_transform", mutates_args=())
def _hadamard_transform(x: Tensor, transposed: bool) -> Tensor:
    """Return x @ H, or x @ H^T. An op of its own: torch.compile must not look for the table of matrices."""
    if _has_heads_behind_tokens(x):
        return _hadamard_transform(x.transpose(1, 2), transposed).transpose(1, 2)
    y = hadamard_transform_reference(x, transposed=transposed).contiguous()
    return y.clone() if x.shape[-1] == 1 else y  # an operator never returns its argument


@_hadamard_transform.register_fake
def _(x: Tensor, transposed: bool) -> Tensor:
    if _has_heads_behind_tokens(x):
        return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    return x.new_empty(x.shape)


def _has_heads_behind_tokens(x: Tensor) -> bool:
    """Return whether x [batch, heads, tokens, channels] lies in memory as a linear made it; there it stays."""
    return x.ndim == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def _remember_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.transposed = inputs[1]


def _transform_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _hadamard_transform(grad, not ctx.transposed), None


_hadamard_transform.register_autograd(_transform_back, setup_context=_remember_transposed)


def hadamard_fake_quantize(x: Tensor, scale: Tensor, low: int, high: int, up: Tensor | None = None) -> Tensor:
    """Return `fake_quantize(hadamard_transform(x), scale, None, low, high)` with its gradients, in fewer passes.

    Args:
        x: as `hadamard_transform` takes it.
        scale: a positive scalar.
        low: smallest code.
        high: largest code.
        up: of x's shape and type; x then is the gate of a SwiGLU, and silu(x) * up is transformed.

    Raises:
        KernelInputError: types or shapes do not fit, or the last axis has no known Hadamard matrix.
    """
    if not x.is_floating_point() or scale.shape != ():
        raise KernelInputError(
            f"hadamard_fake_quantize needs floating-point x and a scalar scale, got {x.dtype} and {tuple(scale.shape)}"
        )
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        raise KernelInputError(f"up must be like x, {tuple(x.shape)} {x.dtype}, got {tuple(up.shape)} {up.dtype}")
    up = None if up is None else _as_product_reads(up)
    result: Tensor = _hadamard_fake_quantize(_as_product_reads(x), scale, low, high, up)[0]
    return result


def _as_product_reads(x: Tensor) -> Tensor:
    """Return x in the autocast type, if autocast is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@torch.library.custom_op("prefixquant::hadamard_fake_quantize", mutates_args=())
def _hadamard_fake_quantize(x: Tensor, scale: Tensor, low: int, high: int, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the result, and the transform, which the backward needs."""
    if not _takes_training_kernel(x):
        transformed = _hadamard_transform((x if up is None else F.silu(x) * up).contiguous(), False)
        return fake_quantize(transformed, scale, None, low, high), transformed
    from .train_kernel import forward_triton

    with torch.cuda.device(x.device):
        y, transformed = forward_triton(_as_rows(x), scale.float(), low, high, None if up is None else _as_rows(up))
    return y.view(x.shape), transformed.view(x.shape)


@_hadamard_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, low: int, high: int, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("prefixquant::hadamard_fake_quantize_backward", mutates_args=())
def _hadamard_fake_quantize_backward(
    grad: Tensor, transformed: Tensor, scale: Tensor, low: int, high: int, x: Tensor | None, up: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for x, up (empty if there is none) and scale."""
    if not _takes_training_kernel(transformed):
        dtransformed, dscale = fake_quantize_gradients(grad, transformed, scale, low, high)
        dx = _hadamard_transform(dtransformed, True)
        if x is None or up is None:
            return dx, dx.new_empty(0), dscale
        return torch.ops.aten.silu_backward(dx * up, x).contiguous(), (dx * F.silu(x)).contiguous(), dscale
    from .train_kernel import backward_triton

    rows = [None if each is None else _as_rows(each) for each in (x, up)]
    with torch.cuda.device(grad.device):
        found, dup, dscale = backward_triton(_as_rows(grad), _as_rows(transformed), scale.float(), low, high, *rows)
    shape = transformed.shape
    return found.view(shape), found.new_empty(0) if dup is None else dup.view(shape), dscale.to(scale.dtype)


@_hadamard_fake_quantize_backward.register_fake
def _(
    grad: Tensor, transformed: Tensor, scale: Tensor, low: int, high: int, x: Tensor | None, up: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx = transformed.new_empty(transformed.shape)
    return dx, transformed.new_empty((0,) if up is None else transformed.shape), scale.new_empty(())


def _as_rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def _remember_transform(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, ctx.low, ctx.high, up = inputs
    ctx.set_materialize_grads(False)  # no zeros for the transform, which is nobody's result
    ctx.save_for_backward(output[1], scale, None if up is None else x, up)


@once_differentiable
def _quantize_back(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    transformed, scale, x, up = ctx.saved_tensors
    dx, dup, dscale = _hadamard_fake_quantize_backward(grad, transformed, scale, ctx.low, ctx.high, x, up)
    return dx, dscale, None, None, None if up is None else dup


_hadamard_fake_quantize.register_autograd(_quantize_back, setup_context=_remember_transform)


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


def _takes_training_kernel(x: Tensor) -> bool:
    if not (x.is_cuda and x.numel() and _has_triton()):
        return False
    from .train_kernel import takes

    return takes(x)


def _fits_kernel(x: Tensor) -> bool:
    if not (x.is_cuda and _has_triton()):
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


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
