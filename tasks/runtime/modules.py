"""The parts of a block at run time: codes flow from norm to product, keys and values into the packed cache.

Letters: B batch, T tokens, D hidden, C channels of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefixquant.kernels.gemm import FEW_ROWS, add_channels, quantized_linear, quantized_products
from prefixquant.kernels.hadamard import hadamard_quantize, hadamard_transform
from prefixquant.kernels.kv_attention import kv_attention, split_heads
from prefixquant.kernels.quantize import quantize
from prefixquant.tasks.runtime.cache import PackedCache

PACKED_FEW_ROWS = 256
"""Rows up to which products read packed weights; above, unpacking them first for the fp8 tensor cores pays."""

PROGRAMS = 264
"""Programs that fill a large GPU twice; attention over a long cache is split until there are so many."""

SPLIT_PLACES = 128
"""Places that a part of the cache has at least."""


class Coded(NamedTuple):
    """An activation as a product takes it."""

    values: Tensor
    """Codes, or the values themselves where activations are not quantized."""

    scale: Tensor | None
    """None with values; else a float32 scalar, or one a token."""


class Product(NamedTuple):
    """What a product gave."""

    values: Tensor
    """[B, T, O]."""

    channel_scale: Tensor | None
    """float32 [O] that the values still lack, or None."""

    def finished(self) -> Tensor:
        """Return the values with their scales."""
        if self.channel_scale is None:
            return self.values
        return (self.values * self.channel_scale).to(self.values.dtype)


class InputSite(nn.Module):
    """Quantizes what enters a product: with a static scale, with each token's own, or not at all."""

    scale: Tensor | None
    clip_ratio: Tensor | None

    def __init__(self, bits: int | None, scale: Tensor | None, clip_ratio: Tensor | None, fp8_rows: int | None) -> None:
        """`bits` None: not at all. Exactly one of scale and clip ratio otherwise, float32 scalars.

        Codes are int8, or fp8 from `fp8_rows` tokens on, which takes 4 bits; None: never.
        """
        super().__init__()
        self.bits, self.fp8_rows = bits, fp8_rows
        self.register_buffer("scale", scale)
        self.register_buffer("clip_ratio", clip_ratio)

    def layout(self, x: Tensor) -> str:
        """Return the layout of the codes of x [B, T, ...]."""
        return "int8" if self.fp8_rows is None or x.shape[0] * x.shape[1] < self.fp8_rows else "fp8"

    def forward(self, x: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> Coded:
        """Return x [B, T, ...], through RMSNorm first if `gain` is given, as codes."""
        if self.bits is None:
            return Coded(x if gain is None else nn.functional.rms_norm(x, gain.shape, gain, eps), None)
        ratio, layout = self.clip_ratio, self.layout(x)
        return Coded(*quantize(x, self.scale, clip_ratio=ratio, gain=gain, eps=eps, bits=self.bits, layout=layout))

    def gated(self, product: Product, hadamard: bool, block: int | None = None) -> Coded:
        """Return silu(gate) * up, through the online Hadamard transform (in blocks) if asked for, as codes."""
        if hadamard and block is not None:
            gate, up = product.finished().chunk(2, dim=-1)
            return self._gated_in_blocks(gate, up, block)
        if hadamard and self.bits is not None:
            gate, up = product.values.chunk(2, dim=-1)
            return Coded(
                *hadamard_quantize(
                    gate,
                    up,
                    self.scale,
                    clip_ratio=self.clip_ratio,
                    channel_scale=product.channel_scale,
                    bits=self.bits,
                    layout=self.layout(gate),
                )
            )
        gate, up = product.finished().chunk(2, dim=-1)
        y = nn.functional.silu(gate) * up
        return Coded(hadamard_transform(y), None) if hadamard else self(y)

    def _gated_in_blocks(self, gate: Tensor, up: Tensor, block: int) -> Coded:
        if self.bits is None or self.scale is None:  # a token's scale looks at all of its blocks
            transformed = hadamard_transform(nn.functional.silu(gate) * up, block)
            return Coded(transformed, None) if self.bits is None else self(transformed)
        gates, ups = (each.unflatten(-1, (-1, block)) for each in (gate, up))
        codes, scale = hadamard_quantize(gates, ups, self.scale, bits=self.bits, layout=self.layout(gate))
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
    wide: Tensor | None

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, wide: Tensor | None
    ) -> None:
        """`weight`: packed uint8 [O, I / 2] or codes [O, I]; `weight_scale`: float32 [O]; `dtype`: of the output;
        `wide`: the codes as float8_e4m3fn [O, I] as well, for many tokens, or None."""
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("wide", wide)

    def forward(self, x: Coded, *, finished: bool = False) -> Product:
        """Return the product [B, T, O]; `finished`: with its channels' scales in any case."""
        wide, scale = x.values.dtype == torch.float8_e4m3fn, x.scale
        if wide and scale is not None and not scale.ndim and self.bias is None and not finished:
            return Product(quantized_products(x.values, scale, self._wide(x), dtype=self.dtype), self.weight_scale)
        y = quantized_linear(x.values, x.scale, self._wide(x), self.weight_scale, self.bias, dtype=self.dtype)
        return Product(y, None)

    def add(self, x: Coded, added: Tensor) -> Tensor:
        """Return the product, added to a tensor [B, T, O]."""
        if x.values.dtype == torch.float8_e4m3fn:
            product = self(x)
            if product.channel_scale is not None:
                return add_channels(added, product.values, product.channel_scale)
            return added + product.values
        return quantized_linear(
            x.values, x.scale, self.weight, self.weight_scale, self.bias, added.contiguous(), dtype=self.dtype
        )

    def _wide(self, x: Coded) -> Tensor:
        return self.weight if self.wide is None or x.values.dtype != self.wide.dtype else self.wide


class CodedMLP(nn.Module):
    """SwiGLU on codes."""

    def __init__(
        self, gate_up: CodedLinear, down: CodedLinear, site: InputSite, hadamard: bool, block: int | None = None
    ) -> None:
        """`block`: channels that the online transform takes together; None: all."""
        super().__init__()
        self.gate_up, self.down, self.site, self.hadamard, self.block = gate_up, down, site, hadamard, block

    def forward(self, x: Coded, added: Tensor) -> Tensor:
        """Return the MLP's result, added to the stream [B, T, D]."""
        # SwiGLU and the transform take longer with scales to load than the product does to apply them.
        gate_up = self.gate_up(x, finished=True)
        return self.down.add(self.site.gated(gate_up, self.hadamard, self.block), added)


class CodedAttention(nn.Module):
    """Attention whose keys and values go into a packed cache."""

    key_scale: Tensor
    value_scale: Tensor
    prefix_keys: Tensor | None
    prefix_values: Tensor | None
    query_gain: Tensor | None
    key_gain: Tensor | None

    def __init__(
        self,
        index: int,
        qkv: CodedLinear,
        out: CodedLinear,
        site: InputSite,
        scales: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor] | None,
        gains: tuple[Tensor, Tensor] | None,
        *,
        eps: float,
        scaling: float,
        hadamard: bool,
    ) -> None:
        """`scales`: float32 [H] of keys and of values; `prefix`: keys and values [H, P, C]; `gains`: of the norms over
        query and key heads, and their `eps`."""
        super().__init__()
        self.index, self.qkv, self.out, self.site = index, qkv, out, site
        self.eps, self.scaling, self.hadamard = eps, scaling, hadamard
        for name, scale in zip(("key_scale", "value_scale"), scales, strict=True):
            self.register_buffer(name, scale)
        for name, part in zip(("prefix_keys", "prefix_values"), prefix or (None, None), strict=True):
            self.register_buffer(name, part)
        for name, gain in zip(("query_gain", "key_gain"), gains or (None, None), strict=True):
            self.register_buffer(name, gain)

    def forward(
        self, x: Coded, position_embeddings: tuple[Tensor, Tensor], cache: PackedCache, added: Tensor
    ) -> Tensor:
        """Return the attention's result, added to the stream [B, T, D]."""
        layer = cache.layers[self.index]
        mixed = self.qkv(x)
        batch, tokens = mixed.values.shape[:2]
        keys, values = self.prefix_keys, self.prefix_values
        query_gain, key_gain = self.query_gain, self.key_gain
        query = split_heads(
            mixed.values,
            *position_embeddings,
            (self.key_scale, self.value_scale),
            (layer.keys, layer.values),
            cache.place,
            hadamard=self.hadamard,
            channel_scale=mixed.channel_scale,
            gains=None if query_gain is None or key_gain is None else (query_gain, key_gain),
            eps=self.eps,
        )
        fused = self.site.scale is not None and tokens * batch <= FEW_ROWS  # its layout is then int8
        y = kv_attention(
            query,
            layer.keys,
            layer.values,
            self.key_scale,
            self.value_scale,
            cache.length,
            scaling=self.scaling,
            start=cache.start,
            prefix=None if keys is None or values is None else (keys, values),
            splits=_splits(batch * self.key_scale.shape[0], tokens, cache.places),
            filled=None if tokens == 1 else cache.filled + tokens,
            out_scale=self.site.scale if fused else None,
            out_bits=self.site.bits or 4,
        ).flatten(2)
        return self.out.add(Coded(y, self.site.scale) if fused else self.site(y), added)


class CodedBlock(nn.Module):
    """What makes a transformers decoder layer run on codes: `become` changes the layer's class to one with this first,
    so that it stays one of its family's."""

    norm1: CodedNorm
    attention: CodedAttention
    norm2: CodedNorm
    mlp: CodedMLP

    @classmethod
    def become(
        cls, layer: nn.Module, norm1: CodedNorm, attention: CodedAttention, norm2: CodedNorm, mlp: CodedMLP
    ) -> None:
        """Replace what the layer consists of, in place."""
        for name, _ in list(layer.named_children()):
            delattr(layer, name)
        layer.norm1, layer.attention, layer.norm2, layer.mlp = norm1, attention, norm2, mlp
        layer.__class__ = type(f"Coded{type(layer).__name__}", (cls, type(layer)), {})

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], packed_cache: PackedCache, **_: Any
    ) -> Tensor:
        """Return the stream [B, T, D] after the block."""
        hidden_states = hidden_states.contiguous()
        hidden_states = self.attention(self.norm1(hidden_states), position_embeddings, packed_cache, hidden_states)
        stream: Tensor = self.mlp(self.norm2(hidden_states), hidden_states)
        return stream


def _splits(programs: int, tokens: int, places: int) -> int:
    """Return into how many parts the cache is cut: many where few programs would read a long one."""
    if tokens > 16:
        return 1
    return max(1, min(PROGRAMS // programs, -(-places // SPLIT_PLACES)))
