"""Tensors and scales in every layout that fake quantization meets, shared by its tests on CPU, interpreter and GPU."""

import torch
from torch import Tensor

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tensor": ((37, 53), ()),
    "tensor-of-groups": ((11, 3, 32), (1, 1, 1)),
    "weight-groups": ((11, 3, 32), (11, 3, 1)),
    "weight-rows-beyond-a-tile": ((3, 1, 4133), (3, 1, 1)),
    "heads": ((2, 3, 5, 16), (3, 1, 1)),
    "activation-groups": ((2, 5, 4, 9), (4, 1)),
    "tokens": ((2, 7, 33), (2, 7, 1)),
    "tokens-across-heads": ((2, 3, 5, 8), (2, 1, 5, 1)),
    "head-groups": ((2, 3, 5, 2, 7), (3, 1, 2, 1)),
    "one-value": ((1,), ()),
}
"""Shapes of x and of its scale; most sizes are off the kernels' tiles."""


def code_range(symmetric: bool) -> tuple[int, int]:
    """Return the smallest and largest code of a 4-bit grid."""
    return (-8, 7) if symmetric else (0, 15)


def make_layout(
    name: str, symmetric: bool, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x in `dtype`, about a tenth of it out of range, a scale, and a zero point that is not whole."""
    shape, scale_shape = LAYOUTS[name]
    generator = torch.Generator().manual_seed(seed)
    kind = torch.promote_types(dtype, torch.float32)
    x = torch.randn(shape, generator=generator, dtype=kind) * 2
    scale = 0.3 + 0.3 * torch.rand(scale_shape, generator=generator, dtype=kind)
    zero_point = 4 + 8 * torch.rand(scale_shape, generator=generator, dtype=kind)
    return x.to(dtype), scale, None if symmetric else zero_point


def border_values() -> Tensor:
    """Return values for a scale of 1: every half from -40 to 40, neighbors of the borders, huge and infinite ones."""
    halves = torch.arange(-80, 81) / 2
    near = torch.tensor([-8.5, 7.5, -0.5, 0.5, 15.5])
    huge = torch.tensor([2.0**22 - 0.5, 2.0**22 + 0.5, 2.0**23 - 0.5, 2.0**23 + 1, 2.0**31, 3e38, float("inf")])
    beside = [near.nextafter(torch.tensor(sign * torch.inf)) for sign in (-1, 1)]
    return torch.cat([halves, near, *beside, huge, -huge])
