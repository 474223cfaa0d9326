"""Compare the Triton kernels of AdamW with the reference on the CPU, through Triton's interpreter.

Run as `python interpreted_adamw.py`. Sizes are off the kernels' tiles.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor

from prefixquant.kernels.adamw.kernel import adamw_triton, total_norm_triton
from prefixquant.kernels.adamw.reference import adamw_reference, total_norm_reference

BETAS, EPS = (0.9, 0.999), 1e-8


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return a parameter, a gradient, and both moments."""
    generator = torch.Generator().manual_seed(0)
    parameter, gradient, first, second = (torch.randn(shape, generator=generator) for _ in range(4))
    return [parameter, gradient.to(dtype), first, second.square()]


def main() -> None:
    """Compare updates of every kind of gradient, and norms."""
    rate, corrections = torch.tensor(1e-2), (torch.tensor(0.271), torch.tensor(0.002997))
    for shape in ((1,), (3, 17), (5, 1000)):
        for dtype in (torch.float32, torch.bfloat16):
            for divisor in (None, torch.tensor(3.7)):
                for decay in (0.0, 0.1):
                    ours, wanted = tensors(shape, dtype), tensors(shape, dtype)
                    for update, each in ((adamw_triton, ours), (adamw_reference, wanted)):
                        update(*each, rate, decay, *corrections, divisor, BETAS, EPS)
                    # the same formulas, perhaps fused multiplications and additions: a few units in the last place
                    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)
                    assert not torch.equal(ours[0], tensors(shape, dtype)[0])
        print(f"{shape} matches")
    several = [tensors((7, 3001), torch.bfloat16)[1], torch.zeros(0), tensors((5,), torch.float32)[1], torch.ones(())]
    # 21,000 squares, added in another order in float32
    torch.testing.assert_close(total_norm_triton(several), total_norm_reference(several), rtol=1e-5, atol=0)
    print("norm matches")


if __name__ == "__main__":
    main()
