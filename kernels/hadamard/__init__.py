"""Orthonormal Hadamard transform of the last axis."""

from torch import Tensor

from prefixquant.kernels.errors import KernelInputError

from .reference import hadamard_factors, hadamard_transform_reference

__all__ = ["hadamard_factors", "hadamard_transform", "has_hadamard"]


def has_hadamard(n: int) -> bool:
    """Return whether an orthonormal Hadamard matrix of order n can be built."""
    try:
        hadamard_factors(n)
    except KernelInputError:
        return False
    return True


def hadamard_transform(x: Tensor) -> Tensor:
    """Return x @ H, H the orthonormal Hadamard matrix of the last axis' size.

    Args:
        x: [..., n] floating point, n with a known order (`hadamard_factors`).

    Raises:
        KernelInputError: x is not floating point, or n has no known Hadamard matrix.
    """
    if not x.is_floating_point():
        raise KernelInputError(f"hadamard_transform needs a floating-point tensor, got {x.dtype}")
    return hadamard_transform_reference(x)
