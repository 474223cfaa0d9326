"""Two 4-bit codes a byte.

The low nibble of byte j of a row of K codes holds code j, the high nibble code j + K / 2, both in two's complement.
A matrix product then reads a tile of bytes once and multiplies it with two contiguous tiles of the other operand,
with no shuffle between the nibbles.
"""

import torch
from torch import Tensor

from prefixquant.kernels.errors import KernelInputError


def pack_int4(codes: Tensor) -> Tensor:
    """Return codes [..., K], integers in -8..7 of any type, as uint8 [..., K / 2].

    Raises:
        KernelInputError: K is odd, or a code is out of range.
    """
    if codes.ndim < 1 or codes.shape[-1] % 2:
        raise KernelInputError(f"pack_int4 needs an even last axis, got {tuple(codes.shape)}")
    whole = codes.to(torch.int8)
    if not torch.equal(whole.to(codes.dtype), codes) or bool(((whole < -8) | (whole > 7)).any()):
        raise KernelInputError("pack_int4 needs whole codes in -8..7")
    low, high = (whole & 15).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the codes [..., K], int8, of bytes [..., K / 2]."""
    if packed.dtype != torch.uint8:
        raise KernelInputError(f"unpack_int4 needs uint8, got {packed.dtype}")
    signed = packed.view(torch.int8)
    return torch.cat([(signed << 4) >> 4, signed >> 4], dim=-1)
