"""Quantization of activations in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.kernels.int4 import pack_int4

STORAGE = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Type in memory of each layout of codes."""


def quantize_reference(
    x: Tensor,
    scale: Tensor | None,
    clip_ratio: Tensor | None,
    gain: Tensor | None,
    eps: float,
    bits: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Return codes and scale as `quantize` does, `scale` None: one a token."""
    if gain is not None:
        x = F.rms_norm(x, gain.shape, gain, eps)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is None:
        assert clip_ratio is not None
        low, high = (each.float() * clip_ratio for each in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
        scale = (2 * torch.maximum(low.abs(), high.abs()) / (2**bits - 1)).clamp_min(1e-8)
    codes = torch.clamp(torch.round(values / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if layout == "int4":
        return pack_int4(codes), scale
    return codes.to(STORAGE[layout]), scale
