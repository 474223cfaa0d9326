"""Linear layers on integer codes: W4A4 through fp8 or int8, W4A8 through int8, W4A16."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from prefixquant.kernels.errors import KernelInputError

from .reference import linear_reference

__all__ = ["quantized_linear"]

_ACTIVATIONS = (torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)


def quantized_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return (x @ codes.T) * x_scale * weight_scale + bias, [..., N] in `dtype`.

    The product of two codes is exact: int8 adds in int32, and 4-bit codes as fp8 are added in float32, where K up to
    2^18 products of at most 64 fit without rounding.

    Args:
        x: [..., K] contiguous: codes as int8 or float8_e4m3fn, or for W4A16 values in bfloat16, float16 or float32.
        x_scale: float32, a scalar or one a token [..., 1]; None for W4A16.
        weight: packed uint8 [N, K / 2] (`kernels.int4`), or codes [N, K] of x's type.
        weight_scale: float32 [N].
        bias: [N].
        dtype: of the result.

    Raises:
        KernelInputError: types, shapes, strides or devices do not fit.
    """
    _check(x, x_scale, weight, weight_scale, bias)
    y: Tensor = _linear(x, x_scale, weight, weight_scale, bias, dtype)
    return y


@torch.library.custom_op("prefixquant::linear", mutates_args=())
def _linear(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not (x.is_cuda and _has_triton()):
        return linear_reference(x, x_scale, weight, weight_scale, bias, dtype)
    from .kernel import linear_triton

    with torch.cuda.device(x.device):  # Triton launches on the current device
        y = linear_triton(x.view(-1, x.shape[-1]), x_scale, weight, weight_scale, bias, dtype)
    return y.view(*x.shape[:-1], -1)


@_linear.register_fake
def _(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _check(x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in _ACTIVATIONS:
        raise KernelInputError(f"quantized_linear takes x as {', '.join(map(str, _ACTIVATIONS))}, got {x.dtype}")
    coded = x.dtype in (torch.int8, torch.float8_e4m3fn)
    if coded == (x_scale is None):
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
    for name, each in {
        "x": x,
        "x_scale": x_scale,
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": bias,
    }.items():
        if each is not None and each.device != x.device:
            raise KernelInputError(f"quantized_linear needs one device, got x on {x.device}, {name} on {each.device}")
        if each is not None and not each.is_contiguous():
            raise KernelInputError(f"quantized_linear needs contiguous tensors; {name} has strides {each.stride()}")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
