"""The Hadamard transform and what stands around it in training, differentiable."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixquant.kernels.dispatch import uses_triton
from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.fake_quantize import fake_quantize, fake_quantize_gradients

from .reference import hadamard_transform_reference


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
        transformed = _hadamard_transform(x.contiguous(), False)
        return fake_quantize(transformed, scale, None, low, high), transformed
    from .train_kernel import forward_triton

    with torch.cuda.device(x.device):
        y, transformed = forward_triton(_as_rows(x), scale.float(), low, high)
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

    with torch.cuda.device(grad.device):
        dx, dscale = backward_triton(_as_rows(grad), _as_rows(transformed), scale.float(), low, high)
    return dx.view(transformed.shape), dscale.to(scale.dtype)


@_hadamard_fake_quantize_backward.register_fake
def _(grad: Tensor, transformed: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    return transformed.new_empty(transformed.shape), scale.new_empty(())


def _as_rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


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


def _takes_training_kernel(x: Tensor) -> bool:
    if not (uses_triton(x) and x.numel()):
        return False
    from .train_kernel import takes

    return takes(x)
