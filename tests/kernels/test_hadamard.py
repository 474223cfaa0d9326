import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hopper import spilled_on_hopper

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.fake_quantize import fake_quantize
from prefixquant.kernels.hadamard import (
    hadamard_factors,
    hadamard_fake_quantize,
    hadamard_quantize,
    hadamard_transform,
    has_hadamard,
)
from prefixquant.kernels.quantize import quantize

# head sizes, hidden and intermediate sizes of known models; only 1 and 64 are powers of two
SIZES = (1, 64, 576, 1536, 4864, 11008, 14336, 18944, 29568)


def rows(n: int, count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_factors_multiply_to_the_size(n):
    assert math.prod(hadamard_factors(n)) == n
    assert has_hadamard(n)


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_transform_keeps_scalar_products(n):
    x = rows(n)
    y = hadamard_transform(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_matrix_has_entries_of_one_magnitude(n):
    # the image of unit vectors: some rows of the matrix, first and last among them
    picked = sorted({0, 1 % n, n // 2, n - 1})
    unit = torch.zeros(len(picked), n, dtype=torch.float64)
    unit[range(len(picked)), picked] = 1
    magnitude = hadamard_transform(unit).abs()
    torch.testing.assert_close(magnitude, torch.full_like(magnitude, 1 / math.sqrt(n)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 12, 64, 576, 1536])
def test_hadamard_transform_is_the_product_with_an_orthonormal_matrix(n):
    identity = torch.eye(n, dtype=torch.float64)
    matrix = hadamard_transform(identity)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
    x = rows(n)
    torch.testing.assert_close(hadamard_transform(x), x @ matrix, rtol=1e-11, atol=1e-11)


def test_hadamard_transform_acts_on_the_last_axis_alone():
    x = rows(96, 30).reshape(2, 3, 5, 96)
    y = hadamard_transform(x)
    torch.testing.assert_close(y[1, 2, 4], hadamard_transform(x[1, 2, 4]))
    torch.testing.assert_close(hadamard_transform(x.transpose(0, 2)), y.transpose(0, 2))


def test_hadamard_transform_keeps_the_dtype():
    x = rows(1536)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):  # some roundings of 2^-24 and 2^-9
        y = hadamard_transform(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), hadamard_transform(x), rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("n", [3, 6, 18, 4 * 257])
def test_hadamard_transform_refuses_a_size_without_a_known_matrix(n):
    assert not has_hadamard(n)
    with pytest.raises(KernelInputError, match=f"order {n} is known"):
        hadamard_transform(torch.ones(2, n))


def test_hadamard_transform_refuses_integers():
    with pytest.raises(KernelInputError, match=r"floating-point tensor, got torch\.int32"):
        hadamard_transform(torch.ones(2, 4, dtype=torch.int32))


def test_a_fused_swiglu_hadamard_and_quantization_are_the_three_in_turn():
    gate, up = torch.randn(2, 4, 5, 96, generator=torch.Generator().manual_seed(0))
    transformed = hadamard_transform(torch.nn.functional.silu(gate) * up)
    codes, scale = hadamard_quantize(gate, up, clip_ratio=torch.tensor(0.9))
    wanted, wanted_scale = quantize(transformed, clip_ratio=torch.tensor(0.9), layout="int8")
    assert scale.shape == (4, 5, 1)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(codes, wanted)
    codes, _ = hadamard_quantize(gate, None, torch.tensor(0.1), layout="fp8")
    assert torch.equal(codes.float(), quantize(hadamard_transform(gate), torch.tensor(0.1), layout="fp8")[0].float())


def test_channel_scales_finish_gate_and_up_where_they_lie():
    mixed = torch.randn(4, 5, 192, generator=torch.Generator().manual_seed(0))
    scales = 0.5 + torch.rand(192, generator=torch.Generator().manual_seed(1))
    gate, up = mixed.chunk(2, dim=-1)  # views of one product
    wanted = hadamard_quantize(*(mixed * scales).chunk(2, dim=-1), torch.tensor(0.1))[0]
    assert torch.equal(hadamard_quantize(gate, up, torch.tensor(0.1), channel_scale=scales)[0], wanted)
    wanted = hadamard_quantize(gate * scales[:96], None, torch.tensor(0.1))[0]
    assert torch.equal(hadamard_quantize(gate, scale=torch.tensor(0.1), channel_scale=scales[:96])[0], wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8).int()}, "float32, bfloat16 or float16"),
        ({"x": torch.zeros(8)}, "float32, bfloat16 or float16"),
        ({"x": torch.zeros(8, 4).T}, "last axis contiguous"),
        ({"up": torch.zeros(8, 4).T}, "like x"),
        ({"up": torch.zeros(4, 8).bfloat16()}, "like x"),
        ({"up": torch.zeros(4, 8, device="meta")}, "like x"),
        ({"channel_scale": torch.ones(16)}, r"channel_scale must be float32 \[8\]"),
        ({"channel_scale": torch.ones(8), "up": torch.zeros(4, 8)}, r"channel_scale must be float32 \[16\]"),
        ({"channel_scale": torch.ones(8).double()}, r"channel_scale must be float32 \[8\]"),
        ({"channel_scale": torch.ones(8, device="meta")}, "on meta"),
        ({"channel_scale": torch.ones(1).expand(8)}, "channel_scale must be"),
        ({"bits": 8, "layout": "fp8"}, "got 8"),
        ({"up": torch.zeros(4, 4)}, "like x"),
        ({"layout": "int4"}, "'int4'"),
        ({"clip_ratio": torch.tensor(1.0)}, "not both"),
        ({"scale": torch.ones(1)}, "float32 scalar"),
        ({"x": torch.zeros(4, 7)}, "order 7"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_input_of_the_fused_operator_is_refused(change, message):
    arguments = {"x": torch.zeros(4, 8), "scale": torch.tensor(1.0)} | change
    with pytest.raises(KernelInputError, match=message):
        hadamard_quantize(**arguments)


@pytest.mark.parametrize("n", [16, 576])
def test_hadamard_fake_quantize_is_its_two_steps_and_so_are_its_gradients(n):
    x = torch.randn(4, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    y, wanted = hadamard_fake_quantize(x, scale, -8, 7), fake_quantize(hadamard_transform(x), scale, None, -8, 7)
    assert torch.equal(y, wanted)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad(y, [x, scale], grad), torch.autograd.grad(wanted, [x, scale], grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_hadamard_fake_quantize_refuses_a_scale_a_row():
    with pytest.raises(KernelInputError, match=r"scalar scale, got torch.float32 and \(4, 1\)"):
        hadamard_fake_quantize(torch.ones(4, 16), torch.ones(4, 1), -8, 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("n", [576, 14336, 28672])
def test_hadamard_fake_quantize_on_the_gpu_is_its_steps(n):
    x, grad = (torch.randn(64, n, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda() for seed in range(2))
    scale = torch.tensor(0.4, device="cuda", requires_grad=True)
    leaves = [x.requires_grad_(), scale]
    y = hadamard_fake_quantize(x, scale, -8, 7)
    wanted = fake_quantize(hadamard_transform(x), scale, None, -8, 7)
    # sums in another order: a value on a border of bfloat16, and then of a code, may fall to the other side
    assert ((y - wanted).abs() > 0.01).float().mean() < 0.01
    (dx, dscale), (wanted_dx, _) = (torch.autograd.grad(each, leaves, grad) for each in (y, wanted))
    assert (dx.float() - wanted_dx.float()).norm() / wanted_dx.float().norm() < 0.05
    # The scale's gradient is a sum whose terms cancel, so those few values show; of the kernel's own transform it is
    # what it is of any values.
    transformed = torch.ops.prefixquant.hadamard_fake_quantize(x.detach(), scale.detach(), -8, 7)[1]
    again = fake_quantize(transformed, scale, None, -8, 7)
    (wanted_dscale,) = torch.autograd.grad(again, [scale], grad)
    terms = (grad.float() * (again - transformed).float() / scale).norm()  # what a sum of random signs comes to
    assert (dscale - wanted_dscale).abs() < 1e-2 * terms


def test_hadamard_fake_quantize_kernels_in_the_interpreter_match_the_reference():
    pytest.importorskip("triton")
    # Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
    script = Path(__file__).with_name("interpreted_hadamard_fake_quantize.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("matches") == 4, done.stdout


@pytest.mark.parametrize("n", [1536, 14336, 28672])
def test_training_kernels_fit_the_registers_of_hopper(tmp_path, n):
    pytest.importorskip("triton")
    from prefixquant.kernels.hadamard import train_kernel

    constants = train_kernel.launch_sizes(n) | {"LOW": -8, "HIGH": 7}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    for kernel, types in (
        (train_kernel._hadamard_forward_kernel, ["*bf16"] * 3 + ["*fp32"] + ["*bf16"] * 2),
        (train_kernel._hadamard_backward_kernel, ["*bf16"] * 4 + ["*fp32"] + ["*bf16"] + ["*fp32"]),
    ):
        assert spilled_on_hopper(kernel, types, constants, options, tmp_path) <= 64  # of 1020 bytes in registers


def test_hadamard_transform_in_blocks_takes_each_block_alone():
    x = rows(96)
    wanted = torch.cat([hadamard_transform(part) for part in x.split(16, dim=-1)], dim=-1)
    torch.testing.assert_close(hadamard_transform(x, 16), wanted, rtol=0, atol=1e-14)
    with pytest.raises(KernelInputError, match="blocks of 20 do not divide the 96 channels"):
        hadamard_transform(x, 20)


def test_hadamard_transform_of_float32_on_a_cpu_is_rounded_once():
    x = rows(1536).float()
    assert torch.equal(hadamard_transform(x), hadamard_transform(x.double()).float())
