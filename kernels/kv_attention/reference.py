"""Attention over a 4-bit KV cache in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.kernels.hadamard.reference import hadamard_transform_reference
from prefixquant.kernels.int4 import pack_int4, unpack_int4


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, hadamard: bool) -> Tensor:
    """Return x [B, H, T, C] after the rotary embedding (cos and sin [B, T, C]) and perhaps a Hadamard transform."""
    low, high = x.chunk(2, dim=-1)
    y = x * cos.unsqueeze(1) + torch.cat([-high, low], dim=-1) * sin.unsqueeze(1)
    return hadamard_transform_reference(y) if hadamard else y


def pack_heads_reference(x: Tensor, scale: Tensor) -> Tensor:
    """Return x [B, H, T, C] as packed codes [B, H, T, C / 2], a float32 scale a head [H]."""
    codes = torch.clamp(torch.round(x / scale.view(-1, 1, 1)), -8, 7)
    return pack_int4(codes)


def split_reference(
    x: Tensor,
    channel_scale: Tensor | None,
    gains: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    hadamard: bool,
    scales: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    place: Tensor,
) -> Tensor:
    """Do what `split_heads` does."""
    batch, tokens, width = x.shape
    kv_heads, channels = caches[0].shape[1], 2 * caches[0].shape[3]
    if channel_scale is not None:
        x = (x * channel_scale).to(x.dtype)  # in float32 at least, as the scales are
    heads = x.view(batch, tokens, width // channels, channels).transpose(1, 2)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if gains is not None:
        query, key = (F.rms_norm(each, gain.shape, gain, eps) for each, gain in zip((query, key), gains, strict=True))
    first = int(place)
    parts = rotate_reference(key, cos, sin, hadamard), value
    for part, scale, cache in zip(parts, scales, caches, strict=True):
        kept = cache[:, :, first : first + tokens]
        kept.copy_(pack_heads_reference(part, scale)[:, :, : kept.shape[2]])
    return rotate_reference(query, cos, sin, hadamard).contiguous()


def attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    length: Tensor,
    start: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    scaling: float,
) -> Tensor:
    """Return what `kv_attention` does, in float64 inside."""
    batch, heads, tokens, _ = query.shape
    end = int(length)
    key = unpack_int4(keys[:, :, :end]).double() * key_scale.double().view(-1, 1, 1)
    value = unpack_int4(values[:, :, :end]).double() * value_scale.double().view(-1, 1, 1)
    position = torch.arange(end, device=query.device)
    row = torch.arange(end - tokens, end, device=query.device)
    seen = (position[None, :] <= row[:, None]).expand(batch, tokens, end)
    if start is not None:
        seen = seen & (position >= start.view(-1, 1, 1))
    if prefix is not None:
        key = torch.cat([prefix[0].double().expand(batch, *prefix[0].shape), key], dim=2)
        value = torch.cat([prefix[1].double().expand(batch, *prefix[1].shape), value], dim=2)
        seen = torch.cat([seen.new_ones(batch, tokens, prefix[0].shape[1]), seen], dim=2)
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query.double() @ key.transpose(-1, -2) * scaling
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num(0.0)  # of a padded row
    return (weights @ value).transpose(1, 2).to(query.dtype)
