"""The runtime's kernels on a GPU against their references, in the types and sizes that models use."""

import pytest
import torch

from prefixquant.kernels.gemm import quantized_linear
from prefixquant.kernels.gemm.reference import linear_reference
from prefixquant.kernels.hadamard import hadamard_quantize
from prefixquant.kernels.hadamard.reference import hadamard_quantize_reference
from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.kv_attention import kv_attention, store_heads
from prefixquant.kernels.kv_attention.reference import attention_reference, pack_heads_reference, rotate_reference
from prefixquant.kernels.quantize import quantize
from prefixquant.kernels.quantize.reference import quantize_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)


def codes(*shape, low=-8, high=8):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).cuda()


def assert_codes(found, wanted):
    """Assert equal codes but for values on the edge between two, which the order of float32 sums decides."""
    found, wanted = ((unpack_int4(each) if each.dtype == torch.uint8 else each).float() for each in (found, wanted))
    difference = (found - wanted).abs()
    assert difference.max() <= 1
    assert difference.mean() <= 2e-3


def fp8(layout):
    if layout == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8_e4m3fn")


@dtypes
@pytest.mark.parametrize("layout", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("columns", [576, 4096, 14336])
def test_quantize(columns, layout, dtype):
    fp8(layout)
    x, gain = randn(70, columns, dtype=dtype), randn(columns, dtype=dtype)
    one, ratio = torch.tensor(0.31, device="cuda"), torch.tensor(0.9, device="cuda")
    plain = quantize(x, one, layout=layout)[0]
    assert torch.equal(
        plain.view(torch.uint8), quantize_reference(x, one, None, None, 0.0, 4, layout)[0].view(torch.uint8)
    )
    for scale, clip_ratio in ((one, None), (None, ratio)):
        found, scales = quantize(x, scale, clip_ratio=clip_ratio, gain=gain, eps=1e-5, layout=layout)
        wanted, wanted_scales = quantize_reference(x, scale, clip_ratio, gain, 1e-5, 4, layout)
        assert_codes(found, wanted)
        torch.testing.assert_close(scales, wanted_scales, rtol=1e-2, atol=0)  # a rounding of the norm in 16 bits


@pytest.mark.parametrize("rows", [1, 16, 50, 300])
@pytest.mark.parametrize(("outputs", "columns"), [(576, 1536), (6144, 4096), (4096, 14336)])
def test_linear_is_exact(rows, outputs, columns):
    weight, scale = codes(outputs, columns), torch.full((outputs,), 0.25, device="cuda")
    wide, narrow = codes(rows, columns, low=-128, high=128).to(torch.int8), codes(rows, columns)
    cases = [(wide, pack_int4(weight)), (narrow.to(torch.int8), weight.to(torch.int8))]
    if torch.cuda.get_device_capability() >= (8, 9):
        narrow = narrow.to(torch.float8_e4m3fn)
        worst = torch.full_like(wide, -8).to(torch.float8_e4m3fn)  # the largest sums there are
        cases += [(narrow, pack_int4(weight)), (narrow, weight.to(torch.float8_e4m3fn))]
        cases += [(worst, pack_int4(torch.full_like(weight, -8)))]
    for x, stored in cases:
        tokens = torch.full((rows, 1), 0.5, device="cuda")
        for x_scale in (tokens[0, 0].clone(), tokens):
            y = quantized_linear(x, x_scale, stored, scale, dtype=torch.float32)
            assert torch.equal(y, linear_reference(x, x_scale, stored, scale, None, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_of_16_bit_activations(dtype):
    weight, scale = pack_int4(codes(4096, 4096)), torch.full((4096,), 0.01, device="cuda")
    x = randn(3, 5, 4096, dtype=dtype)
    y = quantized_linear(x, None, weight, scale, randn(4096), dtype=torch.float32)
    torch.testing.assert_close(
        y, linear_reference(x, None, weight, scale, randn(4096), torch.float32), rtol=1e-4, atol=1e-3
    )


@dtypes
@pytest.mark.parametrize("n", [128, 1536, 11008, 14336, 28672])
def test_hadamard_behind_swiglu(n, dtype):
    gate, up = randn(2, 33, n, dtype=dtype)
    one, ratio = torch.tensor(0.2, device="cuda"), torch.tensor(0.9, device="cuda")
    for scale, clip_ratio in ((one, None), (None, ratio)):
        found, scales = hadamard_quantize(gate, up, scale, clip_ratio=clip_ratio)
        wanted, wanted_scales = hadamard_quantize_reference(gate, up, scale, clip_ratio, 4, "int8")
        difference = (found.float() - wanted.float()).abs()
        assert difference.max() <= 1
        assert difference.mean() <= (2e-3 if dtype == torch.float32 else 5e-2)  # 16-bit steps in between, rounded
        torch.testing.assert_close(scales, wanted_scales, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)


@dtypes
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("tokens", [1, 200])
def test_attention_over_the_cache(tokens, channels, dtype):
    batch, heads, kv_heads, length = 2, 8, 2, 1300
    query = randn(batch, heads, tokens, channels, dtype=dtype)
    keys, values = pack_int4(codes(2, batch, kv_heads, length + 36, channels))
    key_scale, value_scale = torch.full((2, kv_heads), 0.1, device="cuda")
    prefix = tuple(randn(2, kv_heads, 3, channels, dtype=dtype))
    filled = torch.tensor([length], dtype=torch.int32, device="cuda")
    start = torch.tensor([0, 77], dtype=torch.int32, device="cuda")
    wanted = attention_reference(query, keys, values, key_scale, value_scale, filled, start, prefix, channels**-0.5)
    for splits in (1, 6):
        y = kv_attention(
            query, keys, values, key_scale, value_scale, filled, start=start, prefix=prefix, scaling=channels**-0.5,
            splits=splits,
        )  # fmt: skip
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # weights are rounded to 16 bits
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)


@dtypes
def test_keys_are_rotated_and_stored(dtype):
    x = randn(2, 90, 4, 128, dtype=dtype).transpose(1, 2)
    angle = torch.rand(1, 90, 64, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2).cuda()
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    scale = torch.full((4,), 0.3, device="cuda")
    packed = torch.zeros(2, 4, 100, 64, dtype=torch.uint8, device="cuda")
    place = torch.tensor([5], dtype=torch.int32, device="cuda")
    store_heads(x, scale, packed, place, cos=cos, sin=sin, hadamard=True)
    wanted = unpack_int4(pack_heads_reference(rotate_reference(x, cos, sin, True), scale)).float()
    difference = (unpack_int4(packed[:, :, 5:95]).float() - wanted).abs()
    assert difference.max() <= 1
    assert difference.mean() <= (1e-3 if dtype == torch.float32 else 2e-2)  # 16-bit steps in between, rounded
