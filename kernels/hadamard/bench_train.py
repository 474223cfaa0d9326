"""Times the training kernels on one GPU: `python -m prefixquant.kernels.hadamard.bench_train`.

For every row size, alone and behind a SwiGLU, forward and backward with several columns at a time and numbers of warps;
the launch that is used is marked. A launch whose result is not that of PyTorch is not timed. GB/s are of what must be
read and written.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]  # has no types
from torch import Tensor

from prefixquant.kernels.fake_quantize.reference import backward_reference, forward_reference
from prefixquant.kernels.timing import median_ms

from .bench import SHAPES
from .kernel import padded
from .reference import hadamard_transform_reference
from .train_kernel import backward_triton, forward_triton, launch_sizes

LOW, HIGH = -8, 7
TOLERANCE = 0.02
"""Norm of the difference over the norm: bfloat16 between the axes, and values on the border of two codes."""

Results = tuple[Tensor | None, ...]


def main() -> None:
    """Print a line for every launch."""
    if not torch.cuda.is_available():
        raise SystemExit("hadamard.bench_train needs a CUDA GPU, found none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16, medians")
    for name, shape in SHAPES.items():
        if not name.startswith("down_proj"):
            continue
        generator = torch.Generator("cuda").manual_seed(0)
        x, up, grad = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(3))
        scale = torch.tensor(0.4, device="cuda")
        for swiglu in (False, True):
            print(f"{name}{' behind a SwiGLU' if swiglu else ''}")
            second = up if swiglu else None
            transformed = forward_triton(x, scale, LOW, HIGH, second)[1]
            forward = partial(forward_triton, x, scale, LOW, HIGH, second)
            backward = partial(backward_triton, grad, transformed, scale, LOW, HIGH, x if swiglu else None, second)
            _time("forward", forward, _forward(x, second, scale), swiglu, x, 4 if swiglu else 3)
            _time("backward", backward, _backward(grad, transformed, x, second, scale), swiglu, x, 6 if swiglu else 3)


def _time(what: str, call: Callable[..., Results], wanted: Results, swiglu: bool, x: Tensor, passes: int) -> None:
    used = launch_sizes(x.shape[1], swiglu=swiglu)
    for columns, warps in product((32, 64, 128, 256), (4, 8, 16)):
        if columns > padded(x.shape[1])[1]:
            continue
        sizes = used | {"BC": columns, "num_warps": warps}
        line = f"  {what:8} {columns:3d} columns, {warps:2d} warps"
        apart = max(_distance(*pair) for pair in zip(call(sizes=sizes), wanted, strict=True))
        if not apart <= TOLERANCE:
            print(f"{line}: off by {apart:.2g}; not timed")
            continue
        ms = median_ms(partial(call, sizes=sizes), rounds=30, warmup=5)
        print(f"{line}: {ms:.3f} ms, {passes * x.nbytes / ms / 1e6:.0f} GB/s{' (used)' if sizes == used else ''}")


def _distance(mine: Tensor | None, wanted: Tensor | None) -> float:
    if mine is None or wanted is None:
        return 0.0 if mine is wanted else float("inf")
    return float((mine.float() - wanted.float()).norm() / wanted.float().norm())


def _forward(x: Tensor, up: Tensor | None, scale: Tensor) -> Results:
    transformed = hadamard_transform_reference(x if up is None else F.silu(x) * up)
    return forward_reference(transformed, scale, None, LOW, HIGH, x.dtype), transformed


def _backward(grad: Tensor, transformed: Tensor, x: Tensor, up: Tensor | None, scale: Tensor) -> Results:
    found, dscale, _ = backward_reference(grad, transformed, scale, None, LOW, HIGH)
    dx = hadamard_transform_reference(found, transposed=True)
    if up is None:
        return dx, None, dscale
    return torch.ops.aten.silu_backward(dx * up, x), dx * F.silu(x), dscale


if __name__ == "__main__":
    main()
