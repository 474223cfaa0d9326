"""The runtime's kernels on a GPU against their references, in the types and sizes that models use."""

import pytest
import torch

from prefixquant.kernels.dispatch import references
from prefixquant.kernels.gemm import add_channels, quantized_linear, quantized_products
from prefixquant.kernels.hadamard import hadamard_quantize
from prefixquant.kernels.int4 import pack_int4, unpack_int4
from prefixquant.kernels.kv_attention import kv_attention, split_heads
from prefixquant.kernels.quantize import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIZES = [(576, 1536), (6144, 4096), (4096, 14336)]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="this GPU has no float8_e4m3fn")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def codes(*shape, low=-8, high=8, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def plain(found):
    """Return codes of any layout as float32, in which -0 equals 0."""
    return (unpack_int4(found) if found.dtype == torch.uint8 else found).float()


def assert_codes(found, wanted, mean=2e-3):
    """Assert equal codes but for values on the edge between two, which the order of sums decides."""
    difference = (plain(found) - plain(wanted)).abs()
    assert difference.max() <= 1
    assert difference.mean() <= mean


def by_reference(function, *args, **kwargs):
    with references():
        return function(*args, **kwargs)


@dtypes
@pytest.mark.parametrize("layout", ["int4", "int8", pytest.param("fp8", marks=needs_fp8)])
@pytest.mark.parametrize("columns", [576, 4096, 14336])
def test_quantize(columns, layout, dtype):
    x, gain = randn(70, columns, dtype=dtype), randn(columns, dtype=dtype)
    one, ratio = torch.tensor(0.31, device="cuda"), torch.tensor(0.9, device="cuda")
    found, _ = quantize(x, one, layout=layout)
    wanted, _ = by_reference(quantize, x, one, layout=layout)
    assert torch.equal(plain(found), plain(wanted))
    for scale, clip_ratio in ((one, None), (None, ratio)):
        options = {"clip_ratio": clip_ratio, "gain": gain, "eps": 1e-5, "layout": layout}
        found, scales = quantize(x, scale, **options)
        wanted, wanted_scales = by_reference(quantize, x, scale, **options)
        assert_codes(found, wanted)
        torch.testing.assert_close(scales, wanted_scales, rtol=1e-2, atol=0)  # a rounding of the norm in 16 bits


def products(rows, outputs, columns):
    """Give pairs of codes and weights of every type there is, among them the largest sums there are."""
    weight = codes(outputs, columns, seed=1)
    wide, narrow = codes(rows, columns, low=-128, high=128).to(torch.int8), codes(rows, columns)
    lowest = pack_int4(torch.full_like(weight, -8))
    yield wide, pack_int4(weight)
    yield narrow.to(torch.int8), weight.to(torch.int8)
    yield torch.full_like(wide, -8), lowest
    yield torch.full_like(wide, -128), lowest
    yield torch.full_like(wide, 127), lowest
    if HAS_FP8:
        narrow = narrow.to(torch.float8_e4m3fn)
        yield narrow, pack_int4(weight)
        yield narrow, weight.to(torch.float8_e4m3fn)
        yield torch.full_like(wide, -8).to(narrow.dtype), lowest


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 50, 300])
@pytest.mark.parametrize(("outputs", "columns"), [*SIZES, (77, 200)], ids=str)
def test_linear_is_exact(rows, outputs, columns):
    scale = torch.full((outputs,), 0.25, device="cuda")
    for x, stored in products(rows, outputs, columns):
        tokens = torch.full((rows, 1), 0.5, device="cuda")
        for x_scale in (tokens[0, 0].clone(), tokens):
            given = (x, x_scale, stored, scale)
            for _ in range(2):  # programs that share a tile leave nothing behind
                y = quantized_linear(*given, dtype=torch.float32)
                assert torch.equal(y, by_reference(quantized_linear, *given, dtype=torch.float32))


@dtypes
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_bias_and_what_is_added(rows, dtype):
    x, stored = codes(rows, 4096, low=-128, high=128).to(torch.int8), pack_int4(codes(4096, 4096, seed=1))
    bias, added = randn(4096, dtype=dtype), randn(rows, 4096, dtype=dtype, seed=1)
    given = (x, torch.rand(rows, 1).cuda(), stored, torch.rand(4096).cuda() / 100, bias, added)
    y = quantized_linear(*given, dtype=dtype)
    wanted = by_reference(quantized_linear, *given, dtype=dtype)
    # Fused multiply-adds round once where the reference rounds twice, which may take 16 bits to the next step.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=4 * tolerance)
    assert dtype == torch.float32 or (y == wanted).float().mean() > 0.99


@needs_fp8
@pytest.mark.parametrize("rows", [5, 65, 257, 1024])
@pytest.mark.parametrize(("outputs", "columns"), [*SIZES, (77, 200)], ids=str)
def test_products_without_output_scales_are_exact(rows, outputs, columns):
    one = torch.tensor(2.0**-12, device="cuda")
    for x, stored in products(rows, outputs, columns):
        if x.dtype == torch.float8_e4m3fn:
            for dtype in (torch.bfloat16, torch.float32):
                y = quantized_products(x, one, stored, dtype=dtype)
                assert torch.equal(y, by_reference(quantized_products, x, one, stored, dtype=dtype))


@needs_fp8
@pytest.mark.parametrize("columns", [4096, 14336])
def test_units_beside_the_largest_sums_are_kept(columns):
    count, rest = divmod(columns, 15)  # 7 products of 64 and 8 of -56 leave nothing
    x = torch.cat([torch.full((7 * count,), -8), torch.full((rest,), 1), torch.full((8 * count,), 7)])
    weight = torch.full((256, columns), -8, device="cuda")
    weight[:, 7 * count : 7 * count + rest] = codes(256, rest)  # they come when the sum is highest
    x = x.to("cuda", torch.float32).to(torch.float8_e4m3fn).expand(128, columns).contiguous()
    wanted = weight[:, 7 * count : 7 * count + rest].sum(1).bfloat16()
    for stored in (pack_int4(weight), weight.to(torch.float8_e4m3fn)):
        y = quantized_products(x, torch.ones((), device="cuda"), stored, dtype=torch.bfloat16)
        assert torch.equal(y, wanted.expand_as(y))


@needs_fp8
@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_fp8_with_a_scale_a_token(rows, biased):
    x, stored = codes(rows, 4096).to(torch.float8_e4m3fn), pack_int4(codes(6144, 4096, seed=1))
    bias = randn(6144, dtype=torch.bfloat16) if biased else None
    given = (x, torch.rand(rows, 1).cuda(), stored, torch.rand(6144).cuda() / 100, bias)
    y = quantized_linear(*given, dtype=torch.bfloat16)
    wanted = by_reference(quantized_linear, *given, dtype=torch.bfloat16)
    torch.testing.assert_close(y, wanted, rtol=2**-7, atol=2**-7)  # a step of the result
    assert (y == wanted).float().mean() > 0.99


@dtypes
@pytest.mark.parametrize("shape", [(1, 576), (3, 70, 4096)], ids=str)
def test_added_channels(shape, dtype):
    added, y, scale = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[-1], seed=2).abs()
    wanted = by_reference(add_channels, added, y, scale)
    if dtype == torch.float32:  # a fused multiply-add rounds once where the reference rounds twice
        torch.testing.assert_close(add_channels(added, y, scale), wanted, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(add_channels(added, y, scale), wanted)


@halves
@pytest.mark.parametrize("rows", [15, 300])
def test_linear_of_16_bit_activations(rows, dtype):
    weight, scale = pack_int4(codes(4096, 4096)), torch.full((4096,), 0.01, device="cuda")
    given = (randn(rows, 4096, dtype=dtype), None, weight, scale, randn(4096))
    y = quantized_linear(*given, dtype=torch.float32)
    wanted = by_reference(quantized_linear, *given, dtype=torch.float32)
    if rows <= 64:
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-3)
    else:  # weights and results rounded to 16 bits: half a step of each, and the sum over 4096 errors of weights
        tolerance = 2**-7 if dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=8 * tolerance)


def check_hadamard(gate, up, channel_scale):
    one, ratio = torch.tensor(0.2, device="cuda"), torch.tensor(0.9, device="cuda")
    for scale, clip_ratio in ((one, None), (None, ratio)):
        options = {"clip_ratio": clip_ratio, "channel_scale": channel_scale}
        found, scales = hadamard_quantize(gate, up, scale, **options)
        wanted, wanted_scales = by_reference(hadamard_quantize, gate, up, scale, **options)
        exact = gate.dtype == torch.float32
        assert_codes(found, wanted, 2e-3 if exact else 5e-2)  # 16-bit steps in between, rounded
        torch.testing.assert_close(scales, wanted_scales, rtol=1e-5 if exact else 2e-2, atol=0)


@dtypes
@pytest.mark.parametrize("n", [128, 1536, 11008, 14336, 28672])
def test_hadamard_behind_swiglu(n, dtype):
    check_hadamard(*randn(2, 33, n, dtype=dtype), None)


@pytest.mark.parametrize("rows", [1, 600], ids=["a row in slices", "several rows a program"])
@pytest.mark.parametrize("n", [1536, 14336])
def test_hadamard_of_products_without_output_scales(n, rows):
    gate, up = randn(rows, 2 * n, dtype=torch.bfloat16).chunk(2, dim=-1)
    check_hadamard(gate, up, 0.5 + randn(2 * n, seed=1).abs())


def cached(batch, kv_heads, places, channels, length):
    """Return keys, values, their scales and the length of a cache."""
    keys, values = pack_int4(codes(2, batch, kv_heads, places, channels))
    key_scale, value_scale = (0.05 + 0.1 * torch.rand(2, kv_heads, generator=torch.Generator().manual_seed(0))).cuda()
    return keys, values, key_scale, value_scale, torch.tensor([length], dtype=torch.int32, device="cuda")


@dtypes
@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 200])
def test_attention_over_the_cache(tokens, channels, dtype):
    batch, heads, kv_heads, length = 2, 8, 2, 1300
    query = randn(batch, heads, tokens, channels, dtype=dtype)
    given = (query, *cached(batch, kv_heads, length + 36, channels, length))
    prefix = tuple(randn(2, kv_heads, 3, channels, dtype=dtype))
    start = torch.tensor([0, 77], dtype=torch.int32, device="cuda")
    options = {"start": start, "prefix": prefix, "scaling": channels**-0.5}
    wanted = by_reference(kv_attention, *given, **options)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # weights are rounded to 16 bits
    out_scale = torch.tensor(0.05, device="cuda")
    for splits in (1, 6):
        y = kv_attention(*given, **options, splits=splits)
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
        for bits in (4, 8):
            found = kv_attention(*given, **options, splits=splits, out_scale=out_scale, out_bits=bits)
            assert_codes(found, quantize(y.flatten(2), out_scale, bits=bits, layout="int8")[0].view(y.shape), 1e-4)


@halves
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "prefix"])
@pytest.mark.parametrize(("tokens", "length"), [(128, 128), (300, 1301)], ids=str)
def test_long_prompts_attend_over_a_dequantized_copy(tokens, length, prefixed, channels, dtype):
    batch, heads, kv_heads = 2, 8, 2
    query = randn(batch, heads, tokens, channels, dtype=dtype)
    given = (query, *cached(batch, kv_heads, length + 36, channels, length))
    prefix = tuple(randn(2, kv_heads, 3, channels, dtype=dtype)) if prefixed else None
    options = {"prefix": prefix, "scaling": channels**-0.5}
    wanted = by_reference(kv_attention, *given, **options)
    y = kv_attention(*given, **options, filled=length)
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)  # weights and the copy are rounded to 16 bits
    assert (y - wanted).float().abs().mean() < 2e-3
    scale = torch.tensor(0.05, device="cuda")
    found = kv_attention(*given, **options, filled=length, out_scale=scale)
    assert torch.equal(found, quantize(y.flatten(2), scale, layout="int8")[0].view(y.shape))


@dtypes
@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize(
    ("scaled", "norm", "hadamard"), [(False, False, False), (False, False, True), (True, True, True)], ids=str
)
def test_heads_are_split_rotated_and_stored(tokens, scaled, norm, hadamard, dtype):
    batch, heads, kv_heads, channels, places = 2, 8, 4, 128, 64
    width = (heads + 2 * kv_heads) * channels
    angle = torch.rand(1, tokens, 64, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2).cuda()
    options = {
        "hadamard": hadamard,
        "channel_scale": 0.5 + randn(width).abs() if scaled else None,
        "gains": tuple(randn(2, channels, dtype=dtype)) if norm else None,
        "eps": 1e-5,
    }
    given = (randn(batch, tokens, width, dtype=dtype), angle.cos().to(dtype), angle.sin().to(dtype))
    scales = (torch.full((kv_heads,), 0.3, device="cuda"), torch.full((kv_heads,), 0.2, device="cuda"))
    found, wanted = torch.full((2, 2, batch, kv_heads, places, channels // 2), 7, dtype=torch.uint8, device="cuda")
    place = torch.tensor([5], dtype=torch.int32, device="cuda")
    query = split_heads(*given, scales, tuple(found), place, **options)
    expected = by_reference(split_heads, *given, scales, tuple(wanted), place, **options)
    if hadamard or norm:
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]  # of sums over a head
        torch.testing.assert_close(query, expected, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(query, expected)  # every product and sum is rounded as PyTorch rounds it
        assert torch.equal(found, wanted)
    assert_codes(found, wanted, 1e-3 if dtype == torch.float32 else 2e-2)
    assert bool((found[:, :, :, :5] == 7).all())
    assert bool((found[:, :, :, 5 + tokens :] == 7).all())


def test_activations_of_more_than_2_gib_are_addressed():
    rows, columns = 2**31 // 14336 + 100, 14336
    x = torch.zeros(rows, columns, dtype=torch.int8, device="cuda")
    x[-1] = 1
    weight = torch.full((16, columns // 2), 0x11, dtype=torch.uint8, device="cuda")
    y = quantized_linear(x, torch.ones((), device="cuda"), weight, torch.ones(16, device="cuda"), dtype=torch.float32)
    assert bool((y[-1] == columns).all())
    assert not bool(y[:-1].any())
