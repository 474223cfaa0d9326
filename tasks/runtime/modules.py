"""The parts of a block at run time: codes flow from norm to product, keys and values into the packed cache.

Letters: B batch, T tokens, D hidden, C channels of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefixquant.kernels.gemm import quantized_linear
from prefixquant.kernels.hadamard import hadamard_quantize, hadamard_transform
from prefixquant.kernels.kv_attention import kv_attention, rotate, store_heads
from prefixquant.kernels.quantize import quantize
from prefixquant.tasks.runtime.cache import PackedCache

PROGRAMS = 264
"""Programs that fill a large GPU twice; attention over a long cache is split until there are so many."""


class Coded(NamedTuple):
    """An activation as a product takes it."""

    values: Tensor
    """Codes, or the values themselves where activations are not quantized."""

    scale: Tensor | None
    """None with values; else a float32 scalar, or one a token."""


class InputSite(nn.Module):
    """Quantizes what enters a product: with a static scale, with each token's own, or not at all."""

    scale: Tensor | None
    clip_ratio: Tensor | None

    def __init__(self, bits: int | None, scale: Tensor | None, clip_ratio: Tensor | None, layout: str) -> None:
        """`bits` None: not at all. Exactly one of scale and clip ratio otherwise, float32 scalars."""
        super().__init__()
        self.bits, self.layout = bits, layout
        self.register_buffer("scale", scale)
        self.register_buffer("clip_ratio", clip_ratio)

    def forward(self, x: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> Coded:
        """Return x [B, T, ...], through RMSNorm first if `gain` is given, as codes."""
        if self.bits is None:
            return Coded(x if gain is None else nn.functional.rms_norm(x, gain.shape, gain, eps), None)
        return Coded(
            *quantize(x, self.scale, clip_ratio=self.clip_ratio, gain=gain, eps=eps, bits=self.bits, layout=self.layout)
        )

    def gated(self, gate: Tensor, up: Tensor, hadamard: bool, block: int | None = None) -> Coded:
        """Return silu(gate) * up, through the online Hadamard transform (in blocks) if asked for, as codes."""
        if hadamard and block is not None:
            return self._gated_in_blocks(gate, up, block)
        if hadamard and self.bits is not None:
            return Coded(
                *hadamard_quantize(gate, up, self.scale, clip_ratio=self.clip_ratio, bits=self.bits, layout=self.layout)
            )
        if hadamard:
            return Coded(hadamard_transform(nn.functional.silu(gate) * up), None)
        return self(nn.functional.silu(gate) * up)

    def _gated_in_blocks(self, gate: Tensor, up: Tensor, block: int) -> Coded:
        if self.bits is None or self.scale is None:  # a token's scale looks at all of its blocks
            transformed = hadamard_transform(nn.functional.silu(gate) * up, block)
            return Coded(transformed, None) if self.bits is None else self(transformed)
        gates, ups = (each.unflatten(-1, (-1, block)) for each in (gate, up))
        codes, scale = hadamard_quantize(gates, ups, self.scale, bits=self.bits, layout=self.layout)
        return Coded(codes.flatten(-2), scale)


class CodedNorm(nn.Module):
    """RMSNorm that gives codes."""

    def __init__(self, gain: Tensor, eps: float, site: InputSite) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain, requires_grad=False)
        self.eps, self.site = eps, site

    def forward(self, x_BTD: Tensor) -> Coded:
        """Return the codes of the normalized activation."""
        coded: Coded = self.site(x_BTD, self.weight, self.eps)
        return coded


class CodedLinear(nn.Module):
    """One product, or several that share their input."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`weight`: packed uint8 [O, I / 2] or codes [O, I]; `weight_scale`: float32 [O]; `dtype`: of the output."""
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Coded) -> Tensor:
        """Return the product [B, T, O]."""
        return quantized_linear(x.values, x.scale, self.weight, self.weight_scale, self.bias, dtype=self.dtype)


class CodedMLP(nn.Module):
    """SwiGLU on codes."""

    def __init__(
        self, gate_up: CodedLinear, down: CodedLinear, site: InputSite, hadamard: bool, block: int | None = None
    ) -> None:
        """`block`: channels that the online transform takes together; None: all."""
        super().__init__()
        self.gate_up, self.down, self.site, self.hadamard, self.block = gate_up, down, site, hadamard, block

    def forward(self, x: Coded) -> Tensor:
        """Return the block's second addition to the stream, [B, T, D]."""
        gate, up = (part.contiguous() for part in self.gate_up(x).chunk(2, dim=-1))
        y: Tensor = self.down(self.site.gated(gate, up, self.hadamard, self.block))
        return y


class CodedAttention(nn.Module):
    """Attention whose keys and values go into a packed cache."""

    key_scale: Tensor
    value_scale: Tensor
    prefix_keys: Tensor | None
    prefix_values: Tensor | None

    def __init__(
        self,
        index: int,
        qkv: CodedLinear,
        out: CodedLinear,
        site: InputSite,
        scales: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor] | None,
        norms: tuple[nn.Module | None, nn.Module | None],
        *,
        channels: int,
        scaling: float,
        hadamard: bool,
    ) -> None:
        """`scales`: float32 [H] of keys and of values; `prefix`: keys and values [H, P, C]; `norms`: of heads."""
        super().__init__()
        self.index, self.qkv, self.out, self.site = index, qkv, out, site
        self.q_norm, self.k_norm = norms
        self.channels, self.scaling, self.hadamard = channels, scaling, hadamard
        for name, scale in zip(("key_scale", "value_scale"), scales, strict=True):
            self.register_buffer(name, scale)
        for name, part in zip(("prefix_keys", "prefix_values"), prefix or (None, None), strict=True):
            self.register_buffer(name, part)

    def forward(
        self,
        hidden_states: Coded,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the block's first addition to the stream, [B, T, D]."""
        cache: PackedCache = kwargs["packed_cache"]
        layer = cache.layers[self.index]
        kv_heads = self.key_scale.shape[0]
        mixed = self.qkv(hidden_states)
        batch, tokens = mixed.shape[:2]
        heads = mixed.view(batch, tokens, -1, self.channels).transpose(1, 2)
        query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        keys, values = self.prefix_keys, self.prefix_values
        prefix = None if keys is None or values is None else (keys, values)
        store_heads(key, self.key_scale, layer.keys, cache.place, cos=cos, sin=sin, hadamard=self.hadamard)
        store_heads(value, self.value_scale, layer.values, cache.place)
        y = kv_attention(
            rotate(query, cos, sin, hadamard=self.hadamard).contiguous(),
            layer.keys,
            layer.values,
            self.key_scale,
            self.value_scale,
            cache.length,
            scaling=self.scaling,
            start=cache.start,
            prefix=prefix,
            splits=_splits(batch * kv_heads, tokens, cache.places),
        )
        return self.out(self.site(y.reshape(batch, tokens, -1))), None


def _splits(programs: int, tokens: int, places: int) -> int:
    """Return into how many parts the cache is cut: many where few programs would read a long one."""
    if tokens > 16:
        return 1
    return max(1, min(PROGRAMS // programs, -(-places // 256)))
