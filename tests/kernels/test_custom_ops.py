"""torch.compile and CUDA graphs see the operators as torch's own: schemas, fake kernels and mutations are checked."""

import pytest
import torch

import prefixquant.kernels.fake_quantize  # noqa: F401 - registers its operators
from prefixquant.kernels.gemm import quantized_linear
from prefixquant.kernels.hadamard import hadamard_quantize
from prefixquant.kernels.int4 import pack_int4
from prefixquant.kernels.kv_attention import kv_attention, rotate, store_heads
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
    packed = torch.zeros(2, 1, 5, 8, dtype=torch.uint8)
    cache = pack_int4(codes(2, 1, 5, 16))
    place, length = torch.tensor([1], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    heads = randn(2, 1, 3, 16)
    return {
        "quantize static": (OPS.quantize, (x, ONE, None, None, 0.0, 4, "int4")),
        "quantize dynamic": (OPS.quantize, (x, None, ONE, torch.ones(16), 1e-5, 8, "int8")),
        "linear": (
            OPS.linear,
            (codes(2, 3, 16).to(torch.int8), ONE, pack_int4(codes(6, 16)), torch.ones(6), None, torch.float32),
        ),
        "hadamard": (OPS.hadamard_transform, (x.clone().requires_grad_(), False)),
        "hadamard turned": (OPS.hadamard_transform, (x.transpose(0, 1).requires_grad_(), True)),
        "hadamard of heads": (OPS.hadamard_transform, (randn(2, 5, 3, 16).transpose(1, 2).requires_grad_(), True)),
        "hadamard, fake quantize": (
            OPS.hadamard_fake_quantize,
            (x.transpose(0, 1).requires_grad_(), ONE.clone().requires_grad_(), -8, 7, None),
        ),
        "swiglu, hadamard, fake quantize": (
            OPS.hadamard_fake_quantize,
            (x.clone().requires_grad_(), ONE.clone().requires_grad_(), -8, 7, randn(2, 3, 16).requires_grad_()),
        ),
        "hadamard, fake quantize backward": (OPS.hadamard_fake_quantize_backward, (x, x, ONE, -8, 7, x, x)),
        "fake quantize": (
            OPS.fake_quantize,
            (x.transpose(0, 1).requires_grad_(), ONE.clone().requires_grad_(), None, -8, 7, torch.bfloat16),
        ),
        "fake quantize backward": (
            OPS.fake_quantize_backward,
            (x.transpose(0, 1), x.transpose(0, 1), ONE, ONE * 3, 0, 15, True, True, torch.bfloat16),
        ),
        "hadamard static": (OPS.hadamard_quantize, (x, x, ONE, None, 4, "int8")),
        "hadamard dynamic": (OPS.hadamard_quantize, (x, None, None, ONE, 4, "fp8")),
        "rotate": (OPS.rotate, (heads, angle, angle, True)),
        "store": (OPS.store_heads, (heads, torch.ones(1), packed, place, angle, angle, False)),
        "attention": (
            OPS.kv_attention,
            (randn(2, 2, 3, 16), cache, cache, torch.ones(1), torch.ones(1), length, None, None, None, 0.25, 1),
        ),
    }


@pytest.mark.parametrize("name", samples())
def test_operators_are_well_formed(name):
    op, arguments = samples()[name]
    torch.library.opcheck(op.default, arguments)


def test_a_compiled_chain_of_operators_is_one_graph_with_the_same_result():
    weight, scale = pack_int4(codes(32, 16)), torch.full((32,), 0.1)
    down = pack_int4(codes(16, 16))

    def mlp(x):
        coded, own = quantize(x, ONE, gain=torch.ones(16), eps=1e-5, layout="int8")
        gate, up = (
            each.contiguous() for each in quantized_linear(coded, own, weight, scale, dtype=x.dtype).chunk(2, -1)
        )
        coded, own = hadamard_quantize(gate, up, ONE)
        return quantized_linear(coded, own, down, scale[:16].contiguous(), dtype=x.dtype)

    def attention(x, packed, place, length):
        angle = torch.zeros(2, 3, 16)
        store_heads(x, scale[:1].contiguous(), packed, place, cos=angle + 1, sin=angle)
        query = rotate(x, angle + 1, angle, hadamard=False)
        return kv_attention(query, packed, packed, scale[:1].contiguous(), scale[:1].contiguous(), length, scaling=0.25)

    x = randn(2, 3, 16)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x))
    heads, place = randn(2, 1, 3, 16), torch.tensor([0], dtype=torch.int32)
    caches = torch.zeros(2, 2, 1, 5, 8, dtype=torch.uint8)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    found = compiled(heads, caches[0], place, place + 3)
    torch.testing.assert_close(found, attention(heads, caches[1], place, place + 3))
    assert torch.equal(*caches)
