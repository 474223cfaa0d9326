"""Products of integer codes in plain PyTorch."""

import torch
from torch import Tensor

from prefixquant.kernels.int4 import unpack_int4


def linear_reference(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return what `quantized_linear` does; the product of codes is exact, in float64."""
    codes = (unpack_int4(weight) if weight.dtype == torch.uint8 else weight).to(torch.float64)
    if x_scale is None:
        y = x.double() @ codes.T * weight_scale.double()
    else:
        # Scales meet the exact product in float32, in the order of the kernel.
        y = ((x.to(torch.float64) @ codes.T).float() * x_scale * weight_scale).double()
    if bias is not None:
        y = y.float() + bias.float()
    return y.to(dtype)
