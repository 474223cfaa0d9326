"""Orthonormal Hadamard transform of the last axis, perhaps fused with what stands around it in a model."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixquant.kernels.dispatch import call, uses_triton
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


def hadamard_transform(x: Tensor, block: int | None = None) -> Tensor:
    """Return x @ H, H the orthonormal Hadamard matrix of the last axis' size, or block-diagonal in such matrices; under
    autocast in its type, as a product.

    Args:
        x: [..., n] floating point, n with a known order (`hadamard_factors`).
        block: size of a block of H, a divisor of n with a known order; None: one block of n.

    Raises:
        KernelInputError: x is not floating point, or block does not divide n, or its size has no known matrix.
    """
    if not x.is_floating_point():
        raise KernelInputError(f"hadamard_transform needs a floating-point tensor, got {x.dtype}")
    x = _as_product_reads(x)
    if block is None:
        return _hadamard_transform(x, False)
    if x.shape[-1] % block:
        raise KernelInputError(f"hadamard_transform: blocks of {block} do not divide the {x.shape[-1]} channels")
    return _hadamard_transform(x.unflatten(-1, (-1, block)), False).flatten(-2)


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


def hadamard_fake_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return `fake_quantize(hadamard_transform(x), scale, None, low, high)` with its gradients, in fewer passes.

    Args:
        x: as `hadamard_transform` takes it.
        scale: a positive scalar.
        low: smallest code.
        high: largest code.

    Raises:
        KernelInputError: x is not floating point, its last axis has no known Hadamard matrix, or scale is no scalar.
    """
    if not x.is_floating_point() or scale.shape != ():
        raise KernelInputError(
            f"hadamard_fake_quantize needs floating-point x and a scalar scale, got {x.dtype} and {tuple(scale.shape)}"
        )
    result: Tensor = _hadamard_fake_quantize(_as_product_reads(x), scale, low, high)[0]
    return result


def _as_product_reads(x: Tensor) -> Tensor:
    """Return x in the autocast type, if autocast is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@torch.library.custom_op("prefixquant::hadamard_fake_quantize", mutates_args=())
def _hadamard_fake_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return the result, and the transform, which the backward needs."""
    if not _takes_training_kernel(x):
        transformed = _hadamard_transform(x, False)
        return fake_quantize(transformed, scale, None, low, high), transformed
    from .train_kernel import forward_triton

    with torch.cuda.device(x.device):
        y, transformed = forward_triton(x.contiguous().view(-1, x.shape[-1]), scale.float(), low, high)
    return y.view(x.shape), transformed.view(x.shape)


@_hadamard_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("prefixquant::hadamard_fake_quantize_backward", mutates_args=())
def _hadamard_fake_quantize_backward(
    grad: Tensor, transformed: Tensor, scale: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients for x and scale."""
    if not _takes_training_kernel(transformed):
        dtransformed, dscale = fake_quantize_gradients(grad, transformed, scale, low, high)
        return _hadamard_transform(dtransformed, True), dscale
    from .train_kernel import backward_triton

    rows = transformed.view(-1, transformed.shape[-1])
    with torch.cuda.device(grad.device):
        dx, dscale = backward_triton(grad.contiguous().view(rows.shape), rows, scale.float(), low, high)
    return dx.view(grad.shape), dscale.to(scale.dtype)


@_hadamard_fake_quantize_backward.register_fake
def _(grad: Tensor, transformed: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    return transformed.new_empty(transformed.shape), scale.new_empty(())


def _remember_transform(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, scale, ctx.low, ctx.high = inputs
    ctx.set_materialize_grads(False)  # no zeros for the transform, which is nobody's result
    ctx.save_for_backward(output[1], scale)


@once_differentiable
def _quantize_back(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
    transformed, scale = ctx.saved_tensors
    dx, dscale = _hadamard_fake_quantize_backward(grad, transformed, scale, ctx.low, ctx.high)
    return dx, dscale, None, None


_hadamard_fake_quantize.register_autograd(_quantize_back, setup_context=_remember_transform)


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
        x: [..., n], last axis contiguous, float32, bfloat16 or float16.
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


def _takes_training_kernel(x: Tensor) -> bool:
    if not (uses_triton(x) and x.numel()):
        return False
    from .train_kernel import takes

    return takes(x)


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
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.ndim < 2 or x.stride(-1) != 1:
        raise KernelInputError(
            f"hadamard_quantize needs [..., n] in float32, bfloat16 or float16, the last axis contiguous, got "
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
