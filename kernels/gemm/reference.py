"""Products of integer codes in plain PyTorch."""

import torch
from torch import Tensor

from prefixquant.kernels.int4 import unpack_int4


def linear_reference(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return what `quantized_linear` does; the product of codes is exact.

    What follows it is computed in float32, or in float64 where that is the result's `dtype`.
    """
    kind = torch.promote_types(dtype, torch.float32)
    codes = unpack_int4(weight) if weight.dtype == torch.uint8 else weight
    if x_scale is None:
        y = (x.double() @ codes.double().T * weight_scale.double()).to(kind)
    else:
        largest = 2**7 if x.dtype == torch.int8 else 2**3  # magnitudes of x; those of the weight are at most 2^7
        exact = torch.float32 if largest * 2**7 * x.shape[-1] <= 2**24 else torch.float64
        y = (x.to(exact) @ codes.to(exact).T).to(kind) * x_scale * weight_scale  # in the order of the kernel
    y = (y if bias is None else y + bias.to(kind)).to(dtype)
    return y if added is None else (y.to(kind) + added.to(kind)).to(dtype)


def add_channels_reference(added: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Return what `add_channels` does."""
    kind = torch.promote_types(y.dtype, torch.float32)
    scaled = (y.to(kind) * scale).to(y.dtype)
    return (added.to(kind) + scaled.to(kind)).to(y.dtype)
