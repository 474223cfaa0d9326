"""The product of what two fake quantizers returned, forward from their codes. O outputs, I inputs of a linear.

Codes of 4 bits lie exactly in float8_e4m3fn, whose products run at twice the rate of bfloat16's and are summed in
float32: the result is the exact product of the two grids, rounded once. The backward has one factor that lies on no
grid, and stays as it is.
"""

from typing import Any

import torch
from torch import Tensor

from prefixquant.kernels.dispatch import uses_triton
from prefixquant.kernels.gemm import quantized_linear

LARGEST_BITS = 4


def fits_fp8(weight_OI: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the product with this weight, in this type, is one of those that were measured to be faster in
    fp8: in bfloat16, on a Hopper GPU, both sizes multiples of 16, as the vendor's kernels need them."""
    sizes_fit = all(size % 16 == 0 for size in weight_OI.shape)
    return dtype == torch.bfloat16 and sizes_fit and uses_triton(weight_OI) and _is_hopper(weight_OI.device)


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def code_product(x: Tensor, weight_OI: Tensor, codes_OI: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return x @ weight^T [..., O] in x's type.

    Args:
        x: [..., I] on the grid of a symmetric quantizer of at most 4 bits; bfloat16 or float16.
        weight_OI: likewise, with a scale a row.
        codes_OI: the weight's codes, float8_e4m3fn.
        x_scale: a positive scalar.
        weight_scale: positive, O values.
    """
    y: Tensor = _CodeProduct.apply(x, weight_OI, codes_OI, x_scale.detach(), weight_scale.detach())
    return y


class _CodeProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, codes_OI: Tensor, x_scale: Tensor, weight_scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        x_scale, weight_scale = x_scale.float().view(()), weight_scale.float().reshape(-1)
        # Rounding undoes that of the values to their type. In plain PyTorch: torch.compile does it where x is made.
        x_codes = (x.float() / x_scale).round().to(torch.float8_e4m3fn).contiguous()
        return quantized_linear(x_codes, x_scale, codes_OI, weight_scale, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight_OI = ctx.saved_tensors
        grad = grads[0]
        return grad @ weight_OI, grad.flatten(0, -2).T @ x.flatten(0, -2), None, None, None
