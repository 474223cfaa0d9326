import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from prefixquant.kernels.adamw import adamw_step, total_norm
from prefixquant.kernels.errors import KernelInputError

CUDA = pytest.param("cuda", marks=[
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
])  # fmt: skip
devices = pytest.mark.parametrize("device", ["cpu", CUDA])
SHAPES = [(5, 1000), (33,), ()]
BETAS, EPS = (0.9, 0.999), 1e-8


def randn(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def step_arguments(device="cpu"):
    parameters = [each.to(device) for each in randn(0)]
    return {
        "parameters": parameters,
        "gradients": [each.to(device) for each in randn(1)],
        "first_moments": [torch.zeros_like(each) for each in parameters],
        "second_moments": [torch.zeros_like(each) for each in parameters],
        "rates": [torch.tensor(rate, device=device) for rate in (1e-2, 3e-3, 1e-3)],
        "decays": [0.1, 0.0, 0.1],
        "step": torch.tensor(1.0, device=device),
        "divisor": None,
        "betas": BETAS,
        "eps": EPS,
    }


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("divisor", [None, 2.5])
def test_adamw_steps_are_those_of_torch_in_float64(device, dtype, divisor):
    arguments = step_arguments(device) | {"divisor": None if divisor is None else torch.tensor(divisor, device=device)}
    leaves = [each.double().requires_grad_() for each in randn(0)]
    theirs = torch.optim.AdamW(
        [
            {"params": [leaf], "lr": float(rate), "weight_decay": decay}
            for leaf, rate, decay in zip(leaves, arguments["rates"], arguments["decays"], strict=True)
        ],
        betas=BETAS,
        eps=EPS,
    )
    for step in range(1, 8):
        gradients = [each.to(dtype) for each in randn(step)]
        arguments |= {"gradients": [each.to(device) for each in gradients]}
        arguments["step"].fill_(step)
        adamw_step(**arguments)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.double() / (divisor or 1.0)
        theirs.step()
    found = [each.cpu().double() for each in arguments["parameters"]]
    moved = max(float((a.detach() - b).abs().max()) for a, b in zip(leaves, randn(0), strict=True))
    assert moved > 1e-2
    # seven updates of at most 1e-2, each off by a few units in the last place of float32
    torch.testing.assert_close(found, [each.detach() for each in leaves], rtol=1e-6, atol=1e-6)
    for index, leaf in enumerate(leaves):
        first, second = (arguments[name][index].cpu().double() for name in ("first_moments", "second_moments"))
        torch.testing.assert_close(first, theirs.state[leaf]["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(second, theirs.state[leaf]["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@devices
def test_total_norm_sums_in_float32_over_tensors_of_both_types(device):
    tensors = [torch.randn(300, 301, generator=torch.Generator().manual_seed(0)).bfloat16(), *randn(2)]
    wanted = torch.cat([each.flatten().double() for each in tensors]).norm()
    found = total_norm([each.to(device) for each in tensors])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_adamw_replays_from_a_cuda_graph():
    def fresh():
        return step_arguments("cuda") | {"divisor": torch.tensor(1.5, device="cuda")}

    graphed, plain = fresh(), fresh()
    adamw_step(**fresh())  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_step(**graphed)
    for step in (1, 2):
        for each in (graphed, plain):
            each["step"].fill_(step)
            each["divisor"].fill_(step + 0.5)
            each["rates"][0].fill_(1e-2 / step)
        graph.replay()
        adamw_step(**plain)
    for mine, wanted in zip(graphed["parameters"], plain["parameters"], strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("decays", lambda old: old[:2], "equal length, got 3, 3, 3, 3, 3, 2"),
        ("gradients", lambda old: [old[0].half(), *old[1:]], r"gradient 0 must be .*\(5, 1000\), got torch.float16"),
        ("gradients", lambda old: [*old[:2], torch.ones(2)], r"gradient 2 must be .*\(\), got torch.float32 \(2,\)"),
        ("parameters", lambda old: [old[0].bfloat16(), *old[1:]], "parameter 0 must be contiguous float32"),
        ("second_moments", lambda old: [old[0].T.contiguous().T, *old[1:]], "second moment 0 .* strides"),
    ],
    ids=["count", "fp16-gradient", "gradient-shape", "bf16-parameter", "strided-moment"],
)
def test_adamw_refuses_what_does_not_fit(name, make, said):
    arguments = step_arguments()
    with pytest.raises(KernelInputError, match=said):
        adamw_step(**(arguments | {name: make(arguments[name])}))


@pytest.mark.parametrize("tensors", [[], [torch.ones(2, dtype=torch.float64)]], ids=["none", "float64"])
def test_total_norm_refuses_what_does_not_fit(tensors):
    with pytest.raises(KernelInputError, match="float32 or bfloat16"):
        total_norm(tensors)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_adamw_kernels_in_the_interpreter_match_the_reference():
    # Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
    script = Path(__file__).with_name("interpreted_adamw.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("matches") == 4, done.stdout
