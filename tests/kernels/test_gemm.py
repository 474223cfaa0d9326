import pytest
import torch

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.gemm import quantized_linear
from prefixquant.kernels.int4 import pack_int4

HOPPER = 90


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
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_is_refused_before_anything_runs(change, message):
    with pytest.raises(KernelInputError, match=message):
        quantized_linear(**(arguments() | change), dtype=torch.bfloat16)


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
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefixquant.kernels.gemm.kernel import linear_kernel, tiling

    tile = tiling(2048)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"PACKED": packed, "INTEGER": x_type == "*i8", "X_SCALE": 1, "BIAS": False, "GROUP": 8, **tile}
    types = [x_type, "*fp32", weight_type, "*fp32", "*bf16", "*bf16", "i32", "i32", "i32"]
    signature = dict(zip(linear_kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(types))}
    source = ASTSource(linear_kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    assert instruction in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024  # bytes that a block may have on Hopper
