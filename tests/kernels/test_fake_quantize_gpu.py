import pytest
import torch
from quantize_layouts import LAYOUTS, border_values, code_range, make_layout

from prefixquant.kernels.fake_quantize import fake_quantize
from prefixquant.kernels.fake_quantize.reference import backward_reference, forward_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
grids = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.mark.parametrize("layout", LAYOUTS)
@grids
@dtypes
def test_fake_quantize_on_the_gpu_matches_the_reference(layout, symmetric, dtype):
    pytest.importorskip("triton")
    tensors = [each if each is None else each.cuda() for each in make_layout(layout, symmetric, dtype)]
    low, high = code_range(symmetric)
    leaves = [each.requires_grad_() for each in tensors if each is not None]
    y = fake_quantize(*tensors, low, high)
    assert torch.equal(y, forward_reference(*tensors, low, high, dtype))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    dx, *grid = torch.autograd.grad(y, leaves, grad)
    with torch.no_grad():
        dx_wanted, *grid_wanted = backward_reference(grad, *tensors, low, high)
    assert torch.equal(dx, dx_wanted)
    for mine, theirs in zip(grid, grid_wanted, strict=False):
        # thousands of float32 terms near ten, added in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)


def test_fake_quantize_on_the_gpu_rounds_at_the_borders_as_the_reference():
    x = torch.cat([border_values(), torch.tensor([torch.nan])]).cuda()
    scale = torch.ones((), device="cuda")
    for zero, low, high in ((None, -8, 7), (torch.tensor(6.5, device="cuda"), 0, 15)):
        y = fake_quantize(x, scale, zero, low, high)
        wanted = forward_reference(x, scale, zero, low, high, x.dtype)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


def test_fake_quantize_on_the_gpu_divides_as_the_reference():
    # quotients near a half: a division off by one unit in the last place moves codes here
    scale = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)).add(0.1).cuda()
    x = (torch.arange(-8, 8).cuda() + 0.5) * scale
    assert torch.equal(fake_quantize(x, scale, None, -8, 7), forward_reference(x, scale, None, -8, 7, x.dtype))


@grids
def test_fake_quantize_replays_from_a_cuda_graph(symmetric):
    tensors = [each if each is None else each.cuda() for each in make_layout("weight-groups", symmetric)]
    low, high = code_range(symmetric)
    leaves = [each.requires_grad_() for each in tensors if each is not None]

    def step() -> tuple[torch.Tensor, ...]:
        y = fake_quantize(*tensors, low, high)
        return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture may not
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors[0].copy_(make_layout("weight-groups", symmetric, seed=5)[0])
    for each in captured:
        each.fill_(torch.nan)
    graph.replay()
    for mine, wanted in zip(captured, step(), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_fake_quantize_runs_on_the_device_of_its_input():
    tensors = make_layout("weight-groups", False)
    on_second = [each.to("cuda:1") for each in tensors if each is not None]
    y = fake_quantize(*on_second, 0, 15)
    assert torch.equal(y, forward_reference(*on_second, 0, 15, y.dtype))
