"""Compare the Triton kernels of fake quantization with the reference on the CPU, through Triton's interpreter.

In float32: the interpreter cuts bfloat16 off instead of rounding it. Run as
`python interpreted_fake_quantize.py TESTS`, TESTS being the folder of `quantize_layouts.py`.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, sys.argv[1])

import torch
from quantize_layouts import LAYOUTS, border_values, code_range, make_layout
from torch import Tensor

from prefixquant.kernels.fake_quantize import _folded, _rows
from prefixquant.kernels.fake_quantize.kernel import backward_triton, forward_triton
from prefixquant.kernels.fake_quantize.reference import backward_reference, codes_reference, forward_reference


def compare(name: str, x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int, dtype: torch.dtype) -> None:
    """Raise if a kernel and the reference differ: at all in the result, beyond the order of sums in gradients."""
    rows, scales, zeros = _rows(x, scale, zero)
    assert rows.is_contiguous()
    assert scales.is_contiguous()
    y = forward_triton(rows, scales, zeros, low, high, dtype)[0].view(x.shape)
    wanted = forward_reference(x, scale, zero, low, high, dtype)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    if zero is None:
        same, codes = forward_triton(rows, scales, zeros, low, high, dtype, torch.float32)
        torch.testing.assert_close(same.view(x.shape), wanted, rtol=0, atol=0, equal_nan=True)
        assert codes is not None
        codes_wanted = codes_reference(x, scale, low, high)
        torch.testing.assert_close(codes.view(x.shape), codes_wanted, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_rows = grad.view(rows.shape)
    dx, *grid = backward_triton(grad_rows, rows, scales, zeros, low, high, needs_x=True, needs_grid=True)
    dx_wanted, *grid_wanted = backward_reference(grad, x, scale, zero, low, high)
    assert dx is not None
    assert torch.equal(dx.view(x.shape), dx_wanted)
    assert (grid[1] is None) == (zero is None)
    for mine, theirs in zip((_folded(each, x, scale) for each in grid), grid_wanted, strict=True):
        if mine is not None:  # thousands of float32 terms near ten, added in another order
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3, equal_nan=True)
    only_x = backward_triton(grad_rows, rows, scales, zeros, low, high, needs_x=True, needs_grid=False)
    assert only_x[0] is not None
    assert torch.equal(only_x[0], dx)
    assert only_x[1:] == (None, None)
    only_grid = backward_triton(grad_rows, rows, scales, zeros, low, high, needs_x=False, needs_grid=True)
    assert only_grid[0] is None
    torch.testing.assert_close(only_grid[1], grid[0], rtol=0, atol=0, equal_nan=True)
    print(f"{name} matches")


def main() -> None:
    """Compare every layout, the borders of the range, values beyond it, and memory laid out otherwise."""
    for name in LAYOUTS:
        for symmetric in (True, False):
            compare(f"{name} {symmetric}", *make_layout(name, symmetric), *code_range(symmetric), torch.float32)
    one = torch.tensor(1.0)
    compare("borders", border_values(), one, None, -8, 7, torch.float32)
    compare("borders asymmetric", border_values(), one, torch.tensor(6.5), 0, 15, torch.float32)
    compare("nan", torch.tensor([[torch.nan, 1.0, 2.0], [1.0, 2.0, 3.0]]), torch.ones(2, 1), None, -8, 7, torch.float32)
    x, scale, zero = make_layout("weight-groups", False)
    assert zero is not None
    spread = [each.repeat(1, 1, 3)[..., 1:2] for each in (scale, zero)]
    assert not spread[0].is_contiguous()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    compare("strided", turned, *spread, 0, 15, torch.float32)


if __name__ == "__main__":
    main()
