"""torch.compile and CUDA graphs see the operators as torch's own: schemas, fake kernels and mutations are checked."""

import pytest
import torch

import prefixquant.kernels.fake_quantize  # noqa: F401 - registers its operators
from prefixquant.kernels.gemm import add_channels, quantized_linear, quantized_products
from prefixquant.kernels.hadamard import hadamard_quantize
from prefixquant.kernels.int4 import pack_int4
from prefixquant.kernels.kv_attention import kv_attention, split_heads
from prefixquant.kernels.quantize import quantize

OPS = torch.ops.prefixquant
ONE = torch.tensor(0.5)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def codes(*shape):
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0))


def samples():
    x = randn(2, 3, 16)
    angle = randn(2, 3, 16)
    keys, values = torch.zeros(2, 2, 1, 5, 8, dtype=torch.uint8)
    cache = pack_int4(codes(2, 1, 5, 16))
    place, length = torch.tensor([1], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    prefix = tuple(randn(2, 1, 2, 16))
    gain = torch.ones(16)
    weight, narrow = pack_int4(codes(6, 16)), codes(2, 3, 16).to(torch.int8)
    attended = (randn(2, 2, 3, 16), cache, cache, torch.ones(1), torch.ones(1), length)
    return {
        "quantize static": (OPS.quantize, (x, ONE, None, None, 0.0, 4, "int4")),
        "quantize dynamic": (OPS.quantize, (x, None, ONE, torch.ones(16), 1e-5, 8, "int8")),
        "linear": (OPS.linear, (narrow, ONE, weight, torch.ones(6), None, None, torch.float32)),
        "linear added": (
            OPS.linear,
            (narrow, ONE, weight, torch.ones(6), torch.ones(6), randn(2, 3, 6).bfloat16(), torch.bfloat16),
        ),
        "hadamard": (OPS.hadamard_transform, (x.clone().requires_grad_(), False)),
        "hadamard turned": (OPS.hadamard_transform, (x.transpose(0, 1).requires_grad_(), True)),
        "hadamard of heads": (OPS.hadamard_transform, (randn(2, 5, 3, 16).transpose(1, 2).requires_grad_(), True)),
        "hadamard, fake quantize": (
            OPS.hadamard_fake_quantize,
            (x.transpose(0, 1).requires_grad_(), ONE.clone().requires_grad_(), -8, 7),
        ),
        "hadamard, fake quantize backward": (OPS.hadamard_fake_quantize_backward, (x, x, ONE, -8, 7)),
        "fake quantize with codes": (
            OPS.fake_quantize_with_codes,
            (x.clone().requires_grad_(), ONE.clone().requires_grad_(), -8, 7, torch.bfloat16),
        ),
        "fake quantize": (
            OPS.fake_quantize,
            (x.transpose(0, 1).requires_grad_(), ONE.clone().requires_grad_(), None, -8, 7, torch.bfloat16),
        ),
        "fake quantize backward": (
            OPS.fake_quantize_backward,
            (x.transpose(0, 1), x.transpose(0, 1), ONE, ONE * 3, 0, 15, True, True, torch.bfloat16),
        ),
        "linear of values": (OPS.linear, (x, None, weight, torch.ones(6), None, None, torch.float32)),
        "products": (OPS.products, (narrow.to(torch.float8_e4m3fn), ONE, weight, torch.bfloat16)),
        "add channels": (OPS.add_channels, (x, x + 1, torch.ones(16))),
        "hadamard static": (OPS.hadamard_quantize, (x, x, ONE, None, torch.ones(32), 4, "int8")),
        "hadamard dynamic": (OPS.hadamard_quantize, (x, None, None, ONE, None, 4, "fp8")),
        "split": (
            OPS.split_heads,
            (
                *(randn(2, 3, 64), torch.ones(64), gain, gain, 1e-3, angle, angle, True, torch.ones(1), torch.ones(1)),
                *(keys, values, place),
            ),
        ),
        "split plain": (
            OPS.split_heads,
            (
                *(randn(2, 3, 64), None, None, None, 0.0, angle, angle, False, torch.ones(1), torch.ones(1)),
                *(keys, values, place),
            ),
        ),
        "attention": (OPS.kv_attention, (*attended, None, None, None, 0.25, 1, None, None, 4)),
        "attention coded": (
            OPS.kv_attention,
            (*attended, torch.tensor([0, 2], dtype=torch.int32), *prefix, 0.25, 2, 4, ONE, 8),
        ),
    }


@pytest.mark.parametrize("name", samples())
def test_operators_are_well_formed(name):
    op, arguments = samples()[name]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if any(isinstance(each, torch.Tensor) and each.dtype == torch.float8_e4m3fn for each in arguments):
        checks = checks[1:]  # the first compares inputs by sums that torch lacks for float8
    torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_a_compiled_chain_of_operators_is_one_graph_with_the_same_result():
    weight, scale = pack_int4(codes(32, 16)), torch.full((32,), 0.1)
    down = pack_int4(codes(16, 16))
    qkv, channel_scale = pack_int4(codes(48, 16)), torch.full((48,), 0.1)

    def mlp(x):
        coded, own = quantize(x, ONE, gain=torch.ones(16), eps=1e-5, layout="int8")
        gate, up = (
            each.contiguous() for each in quantized_linear(coded, own, weight, scale, dtype=x.dtype).chunk(2, -1)
        )
        coded, own = hadamard_quantize(gate, up, ONE)
        return quantized_linear(coded, own, down, scale[:16].contiguous(), dtype=x.dtype)

    def attention(x, keys, values, place, length):
        angle, one = torch.zeros(2, 3, 16), scale[:1].contiguous()
        mixed = quantized_products(quantize(x, ONE, layout="fp8")[0], ONE, qkv, dtype=x.dtype)
        query = split_heads(
            mixed, angle + 1, angle, (one, one), (keys, values), place, hadamard=True, channel_scale=channel_scale
        )
        y = kv_attention(query, keys, values, one, one, length, scaling=0.25, out_scale=ONE)
        added = quantized_linear(y.flatten(2), ONE, weight, scale, added=x.repeat(1, 1, 2), dtype=x.dtype)
        return add_channels(added, added, scale)

    x = randn(2, 3, 16)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x))
    place = torch.tensor([0], dtype=torch.int32)
    caches = torch.zeros(2, 2, 2, 1, 5, 8, dtype=torch.uint8)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    found = compiled(x, *caches[0], place, place + 3)
    torch.testing.assert_close(found, attention(x, *caches[1], place, place + 3))
    assert torch.equal(*caches)
    assert bool(caches[:, :, :, :, :3].any())
