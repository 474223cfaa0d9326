import re

import pytest
import torch
from hopper import compiled_for_hopper

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.gemm import add_channels, quantized_linear, quantized_products
from prefixquant.kernels.int4 import pack_int4


def codes(*shape, seed=0, low=-8, high=8):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def arguments():
    return {
        "x": codes(2, 3, 8).to(torch.int8),
        "x_scale": torch.tensor(0.5),
        "weight": pack_int4(codes(6, 8, seed=1)),
        "weight_scale": torch.full((6,), 0.25),
    }


def test_a_product_of_codes_is_the_product_of_the_dequantized_tensors():
    given = arguments()
    weight = codes(6, 8, seed=1)
    y = quantized_linear(**given, dtype=torch.float32)
    wanted = (given["x"].double() * 0.5) @ (weight.double() * 0.25).T
    assert torch.equal(y.double(), wanted)  # the scales are powers of two
    bias = torch.arange(6.0)
    assert torch.equal(quantized_linear(**given, bias=bias, dtype=torch.float32).double(), wanted + bias)
    tokens = torch.rand(2, 3, 1)
    y = quantized_linear(**(given | {"x_scale": tokens}), dtype=torch.float32)
    torch.testing.assert_close(y.double(), wanted / 0.5 * tokens)


def test_what_is_added_meets_a_product_that_is_rounded():
    given, bias = arguments(), torch.arange(6.0) / 7
    added = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = quantized_linear(**given, bias=bias, dtype=torch.bfloat16)
    assert torch.equal(quantized_linear(**given, bias=bias, added=added, dtype=torch.bfloat16), y + added)


def test_products_without_output_scales_are_finished_by_who_adds_them():
    given = arguments() | {"x": codes(2, 3, 8).to(torch.float8_e4m3fn)}
    scale, added = torch.rand(6), torch.rand(2, 3, 6)
    wanted = quantized_linear(**(given | {"weight_scale": scale}), dtype=torch.float32)
    del given["weight_scale"]
    for weight in (given["weight"], codes(6, 8, seed=1).to(torch.float8_e4m3fn)):
        y = quantized_products(**(given | {"weight": weight}), dtype=torch.float32)
        assert torch.equal(y * scale, wanted)
        assert torch.equal(add_channels(added, y, scale), added + wanted)
    y, added = y.bfloat16(), added.bfloat16()
    assert torch.equal(add_channels(added, y, scale), added + (y * scale).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": codes(2, 8)}, "takes x as"),
        ({"x_scale": None}, "needs x_scale with codes"),
        ({"x": torch.zeros(2, 8)}, "none without"),
        ({"x": codes(2, 10).to(torch.int8)}, "does not fit"),
        ({"x_scale": torch.ones(5)}, "a scalar or"),
        ({"x_scale": torch.ones((), dtype=torch.float64)}, "float32"),
        ({"weight": codes(6, 8).to(torch.float16)}, "packed uint8 or of x's type"),
        ({"weight_scale": torch.ones(1)}, r"float32 \[6\]"),
        ({"bias": torch.ones(5)}, r"bias must be \[6\]"),
        ({"weight_scale": torch.ones(6, device="meta")}, "one device"),
        ({"x": codes(8, 2).to(torch.int8).T}, "contiguous"),
        ({"added": torch.zeros(6, 6, dtype=torch.bfloat16)}, r"added must be \(2, 3, 6\) torch.bfloat16"),
        ({"added": torch.zeros(2, 3, 6)}, r"added must be \(2, 3, 6\) torch.bfloat16"),
        ({"added": torch.zeros(2, 6, 3, dtype=torch.bfloat16).mT}, "contiguous tensors; added"),
        ({"added": torch.zeros(2, 3, 6, dtype=torch.bfloat16, device="meta")}, "added on meta"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_is_refused_before_anything_runs(change, message):
    with pytest.raises(KernelInputError, match=message):
        quantized_linear(**(arguments() | change), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": codes(2, 3, 8).to(torch.int8)}, "float8_e4m3fn and one scale, got torch.int8"),
        ({"x_scale": torch.ones(2, 3, 1)}, "one scale"),
        ({"x_scale": torch.ones(3)}, "a scalar or"),
        ({"weight": codes(6, 8).to(torch.int8)}, "packed uint8 or of x's type"),
        ({"weight": pack_int4(codes(6, 10))}, "does not fit"),
        ({"weight": pack_int4(codes(6, 8)).to("meta")}, "weight on meta"),
        ({"weight": pack_int4(codes(4, 6)).T}, "contiguous"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_of_products_is_refused_before_anything_runs(change, message):
    given = arguments() | {"x": codes(2, 3, 8).to(torch.float8_e4m3fn)} | change
    del given["weight_scale"]
    with pytest.raises(KernelInputError, match=message):
        quantized_products(**given, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added": torch.zeros(3, 5)}, "two alike"),
        ({"added": torch.zeros(3, 6).bfloat16()}, "two alike"),
        ({"added": torch.zeros(3, 6).int(), "y": torch.zeros(3, 6).int()}, "two alike"),
        ({"scale": torch.ones(3)}, r"scale must be float32 \[6\]"),
        ({"scale": torch.ones(6).double()}, r"scale must be float32 \[6\]"),
        ({"scale": torch.ones(1).expand(6)}, "contiguous"),
        ({"scale": torch.ones(6, device="meta")}, "scale on meta"),
        ({"y": torch.zeros(6, 3).T}, "contiguous"),
        ({"added": torch.zeros(6, 3).T}, "contiguous"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_of_added_channels_is_refused_before_anything_runs(change, message):
    given = {"added": torch.zeros(3, 6), "y": torch.zeros(3, 6), "scale": torch.ones(6)} | change
    with pytest.raises(KernelInputError, match=message):
        add_channels(**given)


@pytest.mark.parametrize(
    ("x_type", "weight_type", "packed", "instruction"),
    [
        ("*fp8e4nv", "*u8", True, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        ("*fp8e4nv", "*fp8e4nv", False, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        ("*i8", "*u8", True, "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"),
        ("*bf16", "*u8", True, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
    ],
)
def test_products_compile_to_the_tensor_cores_of_hopper(x_type, weight_type, packed, instruction):
    pytest.importorskip("triton")
    assert instruction in compiled_products(x_type, weight_type, packed, 2048)


@pytest.mark.parametrize("rows", [16, 64, 2048])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("x_type", ["*fp8e4nv", "*i8", "*bf16", "*fp32"])
def test_products_fit_the_shared_memory_of_hopper_and_keep_32_bits(x_type, packed, rows):
    pytest.importorskip("triton")
    ptx = compiled_products(x_type, "*u8" if packed else x_type, packed, rows)  # looks at the shared memory itself
    assert "tf32" not in ptx
    assert ("mma" in ptx) == (x_type != "*fp32")


def compiled_products(x_type, weight_type, packed, rows):
    from prefixquant.kernels.gemm.kernel import linear_kernel, tiling

    tile = tiling(rows, torch.float32 if x_type == "*fp32" else torch.int8)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"PACKED": packed, "INTEGER": x_type == "*i8", "X_SCALE": 1, "BIAS": False, "GROUP": 8, **tile}
    types = [x_type, "*fp32", weight_type, "*fp32", "*bf16", "*bf16", "i32", "i32", "i32"]
    return compiled_for_hopper(linear_kernel, types, constants, options)


FLAGS = {"X_SCALE": 2, "BIAS": True, "ADDED": True, "ASM": True, "OVERLAP": 0}


@pytest.mark.parametrize(
    ("rows", "outputs"),
    [(2, 4096), (16, 4096), (32, 4096), (64, 4096), (64, 28672), (256, 4096), (2048, 4096)],
)
def test_few_rows_compile_to_integer_tensor_cores_that_take_the_weight_from_registers(rows, outputs):
    pytest.importorskip("triton")
    from prefixquant.kernels.gemm.few_rows import rows_kernel, tiling

    tile = tiling(rows, outputs, 2048)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    types = ["*i8", "*fp32", "*i8", "*fp32", *["*bf16"] * 3, "*i32", "*i32", "i32", "i32", "i32"]
    ptx = compiled_for_hopper(rows_kernel, types, FLAGS | tile, options)
    products = re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8\s+\{[^}]*\},\s*(.)", ptx)
    assert products
    assert set(products) == {"{"}  # the first operand is registers; a descriptor of shared memory would be one name
    assert ("atom" in ptx) == (tile["SPLITS"] > 1)


def test_one_row_compiles_to_products_of_four_bytes():
    pytest.importorskip("triton")
    from prefixquant.kernels.gemm.few_rows import VECTOR_TILE, vector_kernel

    tile = dict(VECTOR_TILE)
    options = {"num_warps": tile.pop("num_warps")}
    types = ["*i32", "*fp32", "*i32", "*fp32", "*bf16", "*bf16", "*bf16", "i32", "i32"]
    ptx = compiled_for_hopper(vector_kernel, types, FLAGS | tile, options)
    threads = 32 * options["num_warps"]
    assert ptx.count("dp4a.u32.s32") == 2 * tile["BN"] * tile["BW"] // threads  # two a word
    assert "ld.global.v4.b32" in ptx
