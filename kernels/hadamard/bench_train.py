"""Times the training kernels on one GPU: `python -m prefixquant.kernels.hadamard.bench_train`.

For every row size, forward and backward with several columns at a time and numbers of warps; the launch that is used is
marked. A launch whose result is not that of PyTorch is not timed. GB/s are of what must be read and written.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
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

Results = tuple[Tensor, ...]


def main() -> None:
    """Print a line for every launch."""
    if not torch.cuda.is_available():
        raise SystemExit("hadamard.bench_train needs a CUDA GPU, found none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16, medians")
    for name, shape in SHAPES.items():
        if not name.startswith("down_proj"):
            continue
        generator = torch.Generator("cuda").manual_seed(0)
        x, grad = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(2))
        scale = torch.tensor(0.4, device="cuda")
        print(name)
        transformed = forward_triton(x, scale, LOW, HIGH)[1]
        _time("forward", partial(forward_triton, x, scale, LOW, HIGH), _forward(x, scale), x)
        backward = partial(backward_triton, grad, transformed, scale, LOW, HIGH)
        _time("backward", backward, _backward(grad, transformed, scale), x)


def _time(what: str, call: Callable[..., Results], wanted: Results, x: Tensor) -> None:
    used = launch_sizes(x.shape[1])
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
        print(f"{line}: {ms:.3f} ms, {3 * x.nbytes / ms / 1e6:.0f} GB/s{' (used)' if sizes == used else ''}")


def _distance(mine: Tensor, wanted: Tensor) -> float:
    return float((mine.float() - wanted.float()).norm() / wanted.float().norm())


def _forward(x: Tensor, scale: Tensor) -> Results:
    transformed = hadamard_transform_reference(x)
    return forward_reference(transformed, scale, None, LOW, HIGH, x.dtype), transformed


def _backward(grad: Tensor, transformed: Tensor, scale: Tensor) -> Results:
    found, dscale, _ = backward_reference(grad, transformed, scale, None, LOW, HIGH)
    return hadamard_transform_reference(found, transposed=True), dscale


if __name__ == "__main__":
    main()
