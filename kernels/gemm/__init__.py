"""Linear layers on integer codes: W4A4 through fp8 or int8, W4A8 through int8, W4A16."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.kernels.dispatch import VALUE_TYPES_TEXT, call, takes_values, uses_triton
from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.workspace import one

from .reference import add_channels_reference, linear_reference

__all__ = ["add_channels", "quantized_linear", "quantized_products"]

_CODES = (torch.int8, torch.float8_e4m3fn)
FEW_ROWS = 64
"""Rows up to which reading the weights is what takes time."""


def quantized_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return added + ((x @ codes.T) * x_scale * weight_scale + bias), [..., N] in `dtype`.

    The product of two codes is exact: int8 adds in int32, and 4-bit codes as fp8 are added in float32, where K up to
    2^18 products of at most 64 fit without rounding. What is added meets a product that is rounded to `dtype` already.

    Args:
        x: [..., K] contiguous: codes as int8 or float8_e4m3fn, or for W4A16 values in bfloat16, float16 or float32, or
            in float64 where the reference runs.
        x_scale: float32, a scalar or one a token [..., 1]; None for W4A16.
        weight: packed uint8 [N, K / 2] (`kernels.int4`), or codes [N, K] of x's type.
        weight_scale: float32 [N].
        bias: [N].
        added: [..., N] in `dtype`, contiguous.
        dtype: of the result; float64 where the reference runs, which then computes in it.

    Raises:
        KernelInputError: types, shapes, strides or devices do not fit.
    """
    _check(x, x_scale, weight, weight_scale, bias, dtype)
    if added is not None and (added.shape != (*x.shape[:-1], weight.shape[0]) or added.dtype != dtype):
        raise KernelInputError(
            f"added must be {(*x.shape[:-1], weight.shape[0])} {dtype}, got {tuple(added.shape)} {added.dtype}"
        )
    _check_together("quantized_linear", x, added=added)
    y: Tensor = call(_linear, x, x_scale, weight, weight_scale, bias, added, dtype)
    return y


@torch.library.custom_op("prefixquant::linear", mutates_args=())
def _linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if not uses_triton(x):
        return linear_reference(x, x_scale, weight, weight_scale, bias, added, dtype)
    rows = x.view(-1, x.shape[-1])
    more = None if added is None else added.view(len(rows), -1)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        if x.dtype == torch.int8 and weight.dtype == torch.uint8:
            from .few_rows import linear_few_rows

            assert x_scale is not None
            y = linear_few_rows(rows, x_scale, weight, weight_scale, bias, more, dtype)
        else:
            y = _many(rows, x_scale, weight, weight_scale, bias, dtype)
            y = y if more is None else y.add_(more)
    return y.view(*x.shape[:-1], -1)


def _many(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from .kernel import linear_triton
    from .many_rows import unpack

    if x_scale is None and len(x) > FEW_ROWS and x.dtype != torch.float32:
        wide = unpack(weight, x.dtype, weight_scale)
        return F.linear(x, wide, None if bias is None else bias.to(x.dtype)).to(dtype)
    if x.dtype != torch.float8_e4m3fn or not _fits_scaled_mm(x, weight, dtype):
        return linear_triton(x, x_scale, weight, weight_scale, bias, dtype)
    assert x_scale is not None
    wide = unpack(weight, x.dtype) if weight.dtype == torch.uint8 else weight
    scales = x_scale.reshape(-1, 1).expand(len(x), 1).contiguous(), weight_scale.view(1, -1)
    return torch._scaled_mm(x, wide.T, *scales, bias=None if bias is None else bias.to(dtype), out_dtype=dtype)


def _fits_scaled_mm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and x.shape[1] % 16 == 0 and weight.shape[0] % 16 == 0


@_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def quantized_products(x: Tensor, x_scale: Tensor, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return (x @ codes.T) * x_scale [..., N] in `dtype`: a linear layer that lacks the scales of its outputs.

    With one scale for all of x the vendor's fp8 kernels run at their fastest; whoever reads the result multiplies
    output n by its weight's scale.

    Args:
        x: 4-bit codes as float8_e4m3fn [..., K], contiguous.
        x_scale: float32 scalar.
        weight: packed uint8 [N, K / 2] (`kernels.int4`), or codes [N, K] as float8_e4m3fn.
        dtype: of the result.

    Raises:
        KernelInputError: types, shapes, strides or devices do not fit.
    """
    _check(x, x_scale, weight, x_scale.new_empty(weight.shape[0]), None, dtype)
    if x.dtype != torch.float8_e4m3fn or x_scale.numel() != 1:
        raise KernelInputError(
            f"quantized_products needs x as float8_e4m3fn and one scale, got {x.dtype} and {tuple(x_scale.shape)}"
        )
    y: Tensor = call(_products, x, x_scale, weight, dtype)
    return y


@torch.library.custom_op("prefixquant::products", mutates_args=())
def _products(x: Tensor, x_scale: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if not uses_triton(x):
        return linear_reference(x, x_scale, weight, x_scale.new_ones(weight.shape[0]), None, None, dtype)
    from .many_rows import unpack

    rows = x.view(-1, x.shape[-1])
    with torch.cuda.device(x.device):
        if _fits_scaled_mm(rows, weight, dtype):
            wide = unpack(weight, x.dtype) if weight.dtype == torch.uint8 else weight
            scales = x_scale.view(()), one(x.device)
            y = torch._scaled_mm(rows, wide.T, *scales, out_dtype=dtype)  # without fast accumulation
        else:
            from .kernel import linear_triton

            y = linear_triton(rows, x_scale, weight, x_scale.new_ones(weight.shape[0]), None, dtype)
    return y.view(*x.shape[:-1], -1)


@_products.register_fake
def _(x: Tensor, x_scale: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def add_channels(added: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Return added + round(y * scale), what `quantized_products` gave finished and added to, in added's type.

    Args:
        added: [..., N] contiguous, float32, bfloat16 or float16, or float64 where the reference runs.
        y: likewise, of its type.
        scale: float32 [N].

    Raises:
        KernelInputError: types, shapes, strides or devices do not fit.
    """
    if added.shape != y.shape or added.dtype != y.dtype or not takes_values(y, y.dtype):
        raise KernelInputError(
            f"add_channels needs two alike in {VALUE_TYPES_TEXT}, got {tuple(added.shape)} {added.dtype} and "
            f"{tuple(y.shape)} {y.dtype}"
        )
    if scale.shape != y.shape[-1:] or scale.dtype != torch.float32:
        raise KernelInputError(f"scale must be float32 [{y.shape[-1]}], got {tuple(scale.shape)} {scale.dtype}")
    _check_together("add_channels", y, added=added, scale=scale)
    result: Tensor = call(_add_channels, added, y, scale)
    return result


@torch.library.custom_op("prefixquant::add_channels", mutates_args=())
def _add_channels(added: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    if not uses_triton(y):
        return add_channels_reference(added, y, scale)
    from .many_rows import add_channels_triton

    with torch.cuda.device(y.device):
        return add_channels_triton(added, y, scale)


@_add_channels.register_fake
def _(added: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(y)


def _check(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    if x.dtype not in _CODES and not takes_values(x, x.dtype):
        raise KernelInputError(
            f"quantized_linear takes x as {', '.join(map(str, _CODES))}, {VALUE_TYPES_TEXT}, got {x.dtype}"
        )
    if not takes_values(x, dtype):
        raise KernelInputError(f"quantized_linear gives {VALUE_TYPES_TEXT}, got dtype {dtype}")
    if (x.dtype in _CODES) == (x_scale is None):
        raise KernelInputError(f"quantized_linear needs x_scale with codes and none without, got x {x.dtype}")
    packed = weight.dtype == torch.uint8
    if not packed and weight.dtype != x.dtype:
        raise KernelInputError(f"weight must be packed uint8 or of x's type {x.dtype}, got {weight.dtype}")
    if weight.ndim != 2 or x.ndim < 2 or weight.shape[1] * (2 if packed else 1) != x.shape[-1]:
        raise KernelInputError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)}")
    outputs, tokens = weight.shape[0], (*x.shape[:-1], 1)
    if x_scale is not None and (x_scale.dtype != torch.float32 or x_scale.shape not in ((), tokens)):
        raise KernelInputError(
            f"x_scale must be float32, a scalar or {tokens}, got {tuple(x_scale.shape)} {x_scale.dtype}"
        )
    if weight_scale.dtype != torch.float32 or weight_scale.shape != (outputs,):
        raise KernelInputError(
            f"weight_scale must be float32 [{outputs}], got {tuple(weight_scale.shape)} {weight_scale.dtype}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise KernelInputError(f"bias must be [{outputs}], got {tuple(bias.shape)}")
    _check_together("quantized_linear", x, x_scale=x_scale, weight=weight, weight_scale=weight_scale, bias=bias)


def _check_together(name: str, x: Tensor, **others: Tensor | None) -> None:
    for key, each in {"x": x, **others}.items():
        if each is not None and each.device != x.device:
            raise KernelInputError(f"{name} needs one device, got x on {x.device}, {key} on {each.device}")
        if each is not None and not each.is_contiguous():
            raise KernelInputError(f"{name} needs contiguous tensors; {key} has strides {each.stride()}")
