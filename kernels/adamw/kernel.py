"""AdamW and the sum of squares in Triton, a launch a tensor. N values, a program takes BN of them."""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_UPDATE_BLOCK = 2048
"""Values of a program: 16 a thread of each of the four tensors, four loads of 16 bytes each."""

_SQUARES_BLOCK = 16384


@triton.jit
def _adamw_kernel(
    parameter,
    gradient,
    first,
    second,
    rate,
    correction1,
    correction2,
    divisor,
    N,
    DECAY: tl.constexpr,
    DIVIDE: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BN: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = o < N
    b_g = tl.load(gradient + o, mask=m, other=0.0).to(tl.float32)
    b_first = tl.load(first + o, mask=m, other=0.0)
    b_second = tl.load(second + o, mask=m, other=0.0)
    b_p = tl.load(parameter + o, mask=m, other=0.0)
    rate = tl.load(rate)
    if DIVIDE:
        b_g = b_g / tl.load(divisor)
    b_first += (b_g - b_first) * (1 - BETA1)
    b_second += (b_g * b_g - b_second) * (1 - BETA2)
    root = tl.sqrt(b_second / tl.load(correction2)) + EPS
    b_p = b_p * (1 - rate * DECAY) - (rate / tl.load(correction1)) * (b_first / root)
    tl.store(first + o, b_first, mask=m)
    tl.store(second + o, b_second, mask=m)
    tl.store(parameter + o, b_p, mask=m)


@triton.jit
def _squares_kernel(x, partial, N, BN: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    o = i * BN + tl.arange(0, BN)
    b_x = tl.load(x + o, mask=o < N, other=0.0).to(tl.float32)
    tl.store(partial + i, tl.sum(b_x * b_x, axis=0))


def adamw_triton(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rate: Tensor,
    decay: float,
    correction1: Tensor,
    correction2: Tensor,
    divisor: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update one parameter and its moments in place, as `adamw_reference`."""
    size = parameter.numel()
    if size == 0:
        return
    _adamw_kernel[(triton.cdiv(size, _UPDATE_BLOCK),)](
        parameter,
        gradient.contiguous(),
        first,
        second,
        rate,
        correction1,
        correction2,
        correction1 if divisor is None else divisor,
        size,
        DECAY=decay,
        DIVIDE=divisor is not None,
        BETA1=betas[0],
        BETA2=betas[1],
        EPS=eps,
        BN=_UPDATE_BLOCK,
    )


def total_norm_triton(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all values together; sums are added in a fixed order."""
    # There are many small ones, and a launch takes longer than they do: they go together.
    small = [each.flatten().float() for each in tensors if each.numel() <= _SQUARES_BLOCK]
    parts = [each for each in tensors if each.numel() > _SQUARES_BLOCK] + ([torch.cat(small)] if small else [])
    counts = [triton.cdiv(each.numel(), _SQUARES_BLOCK) for each in parts]
    partial = torch.empty(sum(counts), dtype=torch.float32, device=tensors[0].device)
    for each, sums in zip(parts, partial.split(counts), strict=True):
        if len(sums):
            _squares_kernel[(len(sums),)](each.contiguous(), sums, each.numel(), BN=_SQUARES_BLOCK, num_warps=8)
    return partial.sum().sqrt()
