"""Times Hadamard transforms on one GPU: `python -m prefixquant.kernels.hadamard.bench`.

Where fast_hadamard_transform is installed, it stands beside them for powers of two. Its matrix may have other signs.
"""

from functools import partial
from importlib.util import find_spec

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]  # has no types

from prefixquant.kernels.timing import median_ms

from .kernel import fits, hadamard_triton
from .reference import hadamard_transform_reference

SHAPES = {
    "down_proj input of Llama-3-8B": (4096, 14336),
    "down_proj input of Llama-3-70B": (4096, 28672),
    "queries of Llama-3-8B": (4096 * 32, 128),
    "hidden size of Llama-3-8B": (4096, 4096),
    "down_proj input of SmolLM2-135M": (4096, 1536),
}


def main() -> None:
    """Print a line for every shape, the kernel beside the products of the reference."""
    if not torch.cuda.is_available():
        raise SystemExit("hadamard.bench needs a CUDA GPU, found none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("bfloat16, medians; GB/s of the input read once and the result written once")
    for name, shape in SHAPES.items():
        x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
        products_ms = median_ms(partial(hadamard_transform_reference, x), rounds=30, warmup=5)
        line = f"{name}: products {products_ms:.3f} ms, {2 * x.nbytes / products_ms / 1e6:.0f} GB/s"
        if fits(shape[1], torch.bfloat16):
            wanted = hadamard_transform_reference(x.float())
            error = (hadamard_triton(x)[0].float() - wanted).norm() / wanted.norm()
            if not error <= 5e-3:  # bfloat16 between the axes and at the end: 2^-9 each
                print(f"{line}; the kernel is off by {float(error):.2g}; not timed")
                continue
            kernel_ms = median_ms(partial(hadamard_triton, x), rounds=30, warmup=5)
            line += f"; kernel {kernel_ms:.3f} ms, {2 * x.nbytes / kernel_ms / 1e6:.0f} GB/s"
        print(line + _fast_hadamard_transform(x))


def _fast_hadamard_transform(x: torch.Tensor) -> str:
    """Return what Dao-AILab's kernel takes, if it is installed and knows the size."""
    n = x.shape[-1]
    if find_spec("fast_hadamard_transform") is None or n & (n - 1):
        return ""
    from fast_hadamard_transform import hadamard_transform

    twice = hadamard_transform(hadamard_transform(x, n**-0.5), n**-0.5)  # its matrix is its own inverse
    error = (twice.float() - x.float()).norm() / x.float().norm()
    if not error <= 1e-2:
        return f"; fast_hadamard_transform is off by {float(error):.2g}; not timed"
    ms = median_ms(partial(hadamard_transform, x, n**-0.5), rounds=30, warmup=5)
    return f"; fast_hadamard_transform {ms:.3f} ms, {2 * x.nbytes / ms / 1e6:.0f} GB/s"


if __name__ == "__main__":
    main()
