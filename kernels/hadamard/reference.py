"""Orthonormal Hadamard transforms of the last axis, in plain PyTorch.

A Hadamard matrix of order n has entries +-1 and orthogonal rows; here it is divided by sqrt(n). Orders are built as
Kronecker products of known ones, H_n = H_k1 (x) H_k2 (x) ..., so a transform is one small matrix product an axis.
The known matrices (orders 1, 2 and the multiples of 4 up to 256) come with compressed-tensors.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from compressed_tensors.transform.utils import hadamard as known
from safetensors import safe_open
from torch import Tensor

from prefixquant.kernels.errors import KernelInputError
from prefixquant.kernels.quantize.reference import quantize_reference

MAX_POWER = 128
"""Largest power-of-two factor taken as one matrix product; larger ones are split."""


@lru_cache(maxsize=1)
def _known_orders() -> frozenset[int]:
    with safe_open(known.REPO_PATH, framework="pt") as file:
        return frozenset(int(name) for name in file.keys())  # noqa: SIM118, a safetensors handle is no dict


@lru_cache(maxsize=256)
def hadamard_factors(n: int) -> tuple[int, ...]:
    """Return orders of known Hadamard matrices whose product is n, those with an odd part first.

    One factor 4 * odd is preferred (1536 = 12 * 128, 14336 = 28 * 512); several are used where the odd part is too
    large for the table (29568 = 12 * 28 * 44 * 2). Powers of two are split into factors of at most `MAX_POWER`.

    Raises:
        KernelInputError: no such product is known.
    """
    factors = _factor_odd(n & -n, n // (n & -n), _known_orders()) if n > 0 else None
    if factors is None:
        raise KernelInputError(
            f"no Hadamard matrix of order {n} is known: it must be a product of 2s and multiples of 4 up to 256"
        )
    return factors


def _factor_odd(power: int, odd: int, orders: frozenset[int]) -> tuple[int, ...] | None:
    if odd == 1:
        factors = []
        while power > 1:
            factors.append(min(power, MAX_POWER))
            power //= factors[-1]
        return tuple(factors) or (1,)
    divisors = sorted((d for d in range(3, odd + 1, 2) if odd % d == 0 and 4 * d in orders), reverse=True)
    for divisor in divisors if power >= 4 else ():
        rest = _factor_odd(power // 4, odd // divisor, orders)
        if rest is not None:
            return (4 * divisor, *(factor for factor in rest if factor > 1))
    return None


@lru_cache(maxsize=256)
def hadamard_axes(n: int) -> tuple[tuple[int, ...], ...]:
    """Return `hadamard_factors(n)` with powers of two split, grouped into one or two axes: a transform is one matrix
    product an axis, and those of similar size, multiples of 8, run best (14336 = (28 * 4) * 128)."""
    factors: list[int] = []
    for factor in hadamard_factors(n):
        is_power = factor & (factor - 1) == 0 and factor > 1 and factor != 32  # the table's 32 is no product of 2s
        factors += [2] * (factor.bit_length() - 1) if is_power else [factor]
    if n <= MAX_POWER:
        return (tuple(factors),)

    def cost(split: int) -> tuple[bool, int]:
        sides = math.prod(factors[:split]), math.prod(factors[split:])
        return any(side % 8 for side in sides), sum(sides)

    split = min(range(1, len(factors)), key=cost, default=len(factors))
    groups = (tuple(factors[:split]), tuple(factors[split:]))
    return tuple(group for group in groups if group)


@lru_cache(maxsize=64)
def hadamard_matrix(
    factors: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, transposed: bool = False
) -> Tensor:
    """Return the orthonormal Hadamard matrix that is the Kronecker product of those of known orders, contiguous."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    with safe_open(known.REPO_PATH, framework="pt") as file:
        for order in factors:
            matrix = torch.kron(matrix, file.get_tensor(str(order)).to(torch.float64) / math.sqrt(order))
    # The copy to a GPU comes last, and the host waits for it: kernels read the matrix before those in front are over.
    return (matrix.T if transposed else matrix).to(dtype).contiguous().to(device)


def hadamard_transform_reference(x: Tensor, *, transposed: bool = False) -> Tensor:
    """Return x @ H for the orthonormal Hadamard matrix H of the last axis' size, or x @ H^T; same shape and dtype.

    On a CPU float32 is transformed in float64 and rounded once, so that other implementations give the same bits.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return hadamard_transform_reference(x.double(), transposed=transposed).float()
    shape = x.shape
    *first, last = hadamard_axes(shape[-1])
    matrix = hadamard_matrix(last, x.dtype, x.device)
    y = x.reshape(-1, math.prod(last)) @ (matrix.T if transposed else matrix)
    for factors in first:  # y[..., i, rest] -> sum_i matrix[i, j] y[..., i, rest]
        order = math.prod(factors)
        y = y.reshape(-1, order, shape[-1] // order)
        matrix = hadamard_matrix(factors, x.dtype, x.device)
        left = matrix if transposed else matrix.T
        # matmul would transpose y twice in memory to make one product of it, which on a GPU costs more than it brings
        y = torch.bmm(left.expand(len(y), order, order), y) if y.is_cuda else left @ y
    return y.reshape(shape)


def hadamard_quantize_reference(
    x: Tensor,
    up: Tensor | None,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    channel_scale: Tensor | None,
    bits: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Return codes and scale as `hadamard_quantize` does."""
    if channel_scale is not None:
        n = x.shape[-1]
        x = (x * channel_scale[:n]).to(x.dtype)  # in float32 at least, as the scales are
        up = None if up is None else (up * channel_scale[n:]).to(up.dtype)
    transformed = hadamard_transform_reference(x if up is None else F.silu(x) * up)
    return quantize_reference(transformed, scale, clip_ratio, None, 0.0, bits, layout)
