"""Triton functions that turn values into codes, for kernels that quantize."""
# Triton has no types, and its kernels cannot:
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """Return x as the nearest whole number, halves to even, for magnitudes below 2^22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no bits below one


@triton.jit
def codes_of(x, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return float32 clamp(round(x / scale), LOW, HIGH).

    Bounds come first: they are codes, so the result is the same, and nothing overflows on the way. The quotient is
    corrected by what is left of x, which rounds it as a division does (Markstein, IBM J. Res. Dev. 34 (1990), theorem
    5) in a fraction of the instructions.
    """
    inverse = tl.div_rn(1.0, scale)
    x = tl.minimum(tl.maximum(x, LOW * scale), HIGH * scale)
    quotient = x * inverse
    return nearest(tl.fma(tl.fma(-quotient, scale, x), inverse, quotient))
