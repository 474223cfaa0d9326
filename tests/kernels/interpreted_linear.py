"""Compare the Triton kernels of quantization and of products of codes with the references, by Triton's interpreter.

In float32: the interpreter cuts bfloat16 off instead of rounding it. Run as `python interpreted_linear.py`.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from itertools import product

import torch
from torch import Tensor

from prefixquant.kernels import workspace
from prefixquant.kernels.gemm import few_rows
from prefixquant.kernels.gemm.few_rows import linear_few_rows
from prefixquant.kernels.gemm.kernel import linear_triton
from prefixquant.kernels.gemm.many_rows import add_channels_triton, unpack
from prefixquant.kernels.gemm.reference import add_channels_reference, linear_reference
from prefixquant.kernels.hadamard.kernel import hadamard_triton
from prefixquant.kernels.hadamard.reference import hadamard_quantize_reference, hadamard_transform_reference
from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.quantize.kernel import quantize_triton
from prefixquant.kernels.quantize.reference import quantize_reference
from prefixquant.kernels.workspace import zeros

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
            for offset in (None, bias):
                y = linear_triton(x, scale, stored, weight_scale, offset, torch.float32)
                wanted = linear_reference(x, scale, stored, weight_scale, offset, None, torch.float32)
                assert torch.equal(y, wanted)
        x = torch.randn(rows, columns, generator=GENERATOR)
        y = linear_triton(x, None, pack_int4(weight), weight_scale, bias, torch.float32)
        wanted = linear_reference(x, None, pack_int4(weight), weight_scale, bias, None, torch.float32)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-3)  # float32 sums against float64
    print("linear matches")


def check_few_rows(
    x: Tensor, weight: Tensor, tile: dict[str, int] | None, *, each: bool, biased: bool, more: bool
) -> None:
    """Compare one product of codes x [M, K] and weight [N, K], given its options."""
    rows, outputs = len(x), len(weight)
    x_scale = torch.rand(rows, 1, generator=GENERATOR) if each else torch.tensor(0.3)
    weight_scale = 0.1 + torch.rand(outputs, generator=GENERATOR)
    bias = torch.randn(outputs, generator=GENERATOR) if biased else None
    added = torch.randn(rows, outputs, generator=GENERATOR) if more else None
    given = (x.to(torch.int8), x_scale, pack_int4(weight), weight_scale, bias, added, torch.float32)
    assert torch.equal(linear_few_rows(*given, tile=tile, asm=False), linear_reference(*given))


def compare_few_rows() -> None:
    """One row and several, packed weights in one part and in several, sizes that no tile divides, the largest sums."""

    def random(rows: int, columns: int, low: int = -8, high: int = 8) -> Tensor:
        return torch.randint(low, high, (rows, columns), generator=GENERATOR)

    options = [dict(zip(("each", "biased", "more"), flags, strict=True)) for flags in product((False, True), repeat=3)]
    for outputs, columns in ((1, 8), (13, 88), (70, 2120)):  # of one row: words of a block and more, and some over
        for flags in options:
            check_few_rows(random(1, columns, -128, 128), random(outputs, columns), None, **flags)
    rows_tile = {"BN": 32, "BM": 16, "BK": 32, "num_warps": 4, "num_stages": 1}
    for rows, outputs, columns in ((1, 40, 70), (3, 33, 194), (20, 70, 450)):
        for splits in (1, 3):
            for flags in options:
                x, weight = random(rows, columns, -128, 128), random(outputs, columns)
                check_few_rows(x, weight, rows_tile | {"SPLITS": splits}, **flags)
    plain = {"each": False, "biased": False, "more": False}
    for rows, tile in ((1, None), (17, rows_tile | {"SPLITS": 3})):  # every code and weight the lowest, or opposite
        for code, weight in ((-8, -8), (-128, -8), (127, -8), (-128, 7)):
            check_few_rows(torch.full((rows, 2048), code), torch.full((40, 2048), weight), tile, **plain)
    check_few_rows(random(5, 4100), random(50, 4100), None, **plain)  # in the tile it is launched with
    assert few_rows.tiling(5, 50, 2050)["SPLITS"] > 1
    known = workspace._kept.cache_info().misses
    for size in (2048, 4096):  # what the programs of a tile share is left as it was found
        assert not zeros(torch.device("cpu"), size).any()
    assert workspace._kept.cache_info().misses == known
    print("few rows match")


def compare_many_rows() -> None:
    """Codes unpacked to fp8, exactly, and scaled to values; what scales and adds the products' outputs."""
    for outputs, columns in ((3, 2), (5, 70), (2, 8200)):
        weight = torch.randint(-8, 8, (outputs, columns), generator=GENERATOR)
        packed, scale = pack_int4(weight), 0.1 + torch.rand(outputs, generator=GENERATOR)
        assert torch.equal(unpack(packed, torch.float8_e4m3fn).float(), weight.float())
        assert torch.equal(unpack(packed, torch.float32, scale), weight * scale[:, None])
        powers = torch.exp2(torch.arange(outputs, dtype=torch.float32))
        assert torch.equal(unpack(packed, torch.bfloat16, powers).float(), weight * powers[:, None])
        added, y = torch.randn(2, 7, columns, generator=GENERATOR)
        scale = torch.rand(columns, generator=GENERATOR)
        assert torch.equal(add_channels_triton(added, y, scale), add_channels_reference(added, y, scale))
    print("many rows match")


def compare_hadamard() -> None:
    """One axis and two, sizes that are no powers of two, alone and between SwiGLU and quantization."""
    for n in (16, 96, 128, 576, 1536, 14336):
        x, up = torch.randn(2, 37 if n < 600 else 3, n, generator=GENERATOR)
        y, _ = hadamard_triton(x)
        torch.testing.assert_close(y, hadamard_transform_reference(x), rtol=0, atol=1e-5)  # float32 sums
        scales = 0.5 + torch.rand(2 * n, generator=GENERATOR)
        for scale, clip_ratio in ((torch.tensor(0.2), None), (None, torch.tensor(0.9))):
            check_hadamard(x, up, scale, clip_ratio, None, "int8", torch.int8)
            check_hadamard(x, up, scale, clip_ratio, scales, "fp8", torch.float8_e4m3fn)
        check_hadamard(x, None, torch.tensor(0.2), None, scales[:n].contiguous(), "int8", torch.int8)
    n = 576  # 24 * 24 in a tile of 32 * 32
    wide = torch.randn(7, 2 * n, generator=GENERATOR)  # gate and up side by side, as their product gives them
    for columns, programs in ((16, 7), (32, 2), (16, 3)):  # a row in slices, several rows a program, both
        launch = {"BC": columns, "programs": programs, "num_warps": 4, "num_stages": 1}
        scales = 0.5 + torch.rand(2 * n, generator=GENERATOR)
        check_hadamard(wide[:, :n], wide[:, n:], torch.tensor(0.2), None, scales, "int8", torch.int8, launch)
        y, _ = hadamard_triton(wide[:, n:], launch=launch)
        torch.testing.assert_close(y, hadamard_transform_reference(wide[:, n:]), rtol=0, atol=1e-5)
    launch = {"BC": 32, "programs": 2, "num_warps": 4, "num_stages": 1}
    check_hadamard(wide[:, :n], wide[:, n:], None, torch.tensor(0.9), None, "fp8", torch.float8_e4m3fn, launch)
    print("hadamard matches")


def check_hadamard(
    x: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    channel_scale: Tensor | None,
    layout: str,
    storage: torch.dtype,
    launch: dict[str, int] | None = None,
) -> None:
    """Compare codes and scales of one call."""
    found, scales = hadamard_triton(x, up, scale, clip_ratio, channel_scale, codes=storage, launch=launch)
    wanted, wanted_scales = hadamard_quantize_reference(x, up, scale, clip_ratio, channel_scale, 4, layout)
    difference = (found.float() - wanted.float()).abs()
    assert difference.max() <= 1  # a value on the edge between two codes, by the order of float32 sums
    assert difference.mean() <= 1e-3
    assert scales is not None
    torch.testing.assert_close(scales, wanted_scales, rtol=1e-5, atol=0)


if __name__ == "__main__":
    compare_quantize()
    compare_linear()
    compare_few_rows()
    compare_many_rows()
    compare_hadamard()
