"""Compare the Triton kernels of quantization and of products of codes with the references, by Triton's interpreter.

In float32: the interpreter cuts bfloat16 off instead of rounding it. Run as `python interpreted_linear.py`.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor

from prefixquant.kernels.gemm.kernel import linear_triton
from prefixquant.kernels.gemm.reference import linear_reference
from prefixquant.kernels.hadamard.kernel import hadamard_triton
from prefixquant.kernels.hadamard.reference import hadamard_quantize_reference, hadamard_transform_reference
from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.quantize.kernel import quantize_triton
from prefixquant.kernels.quantize.reference import quantize_reference

GENERATOR = torch.Generator().manual_seed(0)


def plain(codes: Tensor) -> Tensor:
    """Return codes of any layout as float32."""
    return (unpack_int4(codes) if codes.dtype == torch.uint8 else codes).float()


def compare_quantize() -> None:
    """Every layout, static and a token, with a norm in front and without."""
    for columns in (2, 96, 576, 14336):
        x = torch.randn(5, columns, generator=GENERATOR)
        x[0, 0], x[1, 1], x[2] = 1e30, -torch.inf, 0.0
        for layout, bits in (("int4", 4), ("int8", 4), ("int8", 8), ("fp8", 4)):
            for scale in (torch.tensor(0.31), None):
                clip_ratio = torch.tensor(0.9) if scale is None else None
                values = x[2:] if scale is None else x  # an infinite token has no scale
                codes, scales = quantize_triton(values, scale, clip_ratio, None, 0.0, bits, layout)
                wanted, wanted_scales = quantize_reference(values, scale, clip_ratio, None, 0.0, bits, layout)
                assert torch.equal(plain(codes), plain(wanted))
                assert torch.equal(scales, wanted_scales)
                gain = 0.5 + torch.rand(columns, generator=GENERATOR)
                codes, scales = quantize_triton(x[2:], scale, clip_ratio, gain, 1e-5, bits, layout)
                wanted, wanted_scales = quantize_reference(x[2:], scale, clip_ratio, gain, 1e-5, bits, layout)
                # The mean square is summed in another order, which may tip a value on the edge between two codes.
                difference = (plain(codes) - plain(wanted)).abs()
                assert difference.max() <= 1
                assert difference.mean() <= 1e-3
                torch.testing.assert_close(scales, wanted_scales, rtol=1e-6, atol=0)
    print("quantize matches")


def compare_linear() -> None:
    """Every pair of types, sizes that no tile divides, with and without bias."""
    for rows, outputs, columns in ((1, 80, 96), (20, 70, 576), (130, 200, 640)):
        weight = torch.randint(-8, 8, (outputs, columns), generator=GENERATOR)
        weight_scale = 0.1 + torch.rand(outputs, generator=GENERATOR)
        codes = torch.randint(-8, 8, (rows, columns), generator=GENERATOR).to(torch.float8_e4m3fn)
        wide = torch.randint(-128, 128, (rows, columns), generator=GENERATOR).to(torch.int8)
        one, each = torch.tensor(0.3), torch.rand(rows, 1, generator=GENERATOR)
        bias = torch.randn(outputs, generator=GENERATOR)
        for x, scale, stored in (
            (codes, one, pack_int4(weight)),
            (codes, each, weight.to(torch.float8_e4m3fn)),
            (wide, one, pack_int4(weight)),
            (wide, each, weight.to(torch.int8)),
        ):
            for added in (None, bias):
                y = linear_triton(x, scale, stored, weight_scale, added, torch.float32)
                wanted = linear_reference(x, scale, stored, weight_scale, added, torch.float32)
                assert torch.equal(y, wanted)
        x = torch.randn(rows, columns, generator=GENERATOR)
        y = linear_triton(x, None, pack_int4(weight), weight_scale, bias, torch.float32)
        wanted = linear_reference(x, None, pack_int4(weight), weight_scale, bias, torch.float32)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-3)  # float32 sums against float64
    print("linear matches")


def compare_hadamard() -> None:
    """One axis and two, sizes that are no powers of two, alone and between SwiGLU and quantization."""
    for n in (16, 96, 128, 576, 1536, 14336):
        x, up = torch.randn(2, 37 if n < 600 else 3, n, generator=GENERATOR)
        y, _ = hadamard_triton(x)
        torch.testing.assert_close(y, hadamard_transform_reference(x), rtol=0, atol=1e-5)  # float32 sums
        one, ratio = torch.tensor(0.2), torch.tensor(0.9)
        for scale, clip_ratio in ((one, None), (None, ratio)):
            for layout, codes in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
                got, scales = hadamard_triton(x, up, scale, clip_ratio, codes=codes)
                wanted, wanted_scales = hadamard_quantize_reference(x, up, scale, clip_ratio, 4, layout)
                difference = (got.float() - wanted.float()).abs()
                assert difference.max() <= 1  # a value on the edge between two codes, by the order of float32 sums
                assert difference.mean() <= 1e-3
                assert scales is not None
                torch.testing.assert_close(scales, wanted_scales, rtol=1e-5, atol=0)
    print("hadamard matches")


if __name__ == "__main__":
    compare_quantize()
    compare_linear()
    compare_hadamard()
