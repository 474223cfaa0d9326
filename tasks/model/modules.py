"""Modules that take the place of a block's linears and norms. Letters: B batch, T tokens, D channels, O outputs."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from prefixquant.kernels.hadamard import hadamard_transform
from prefixquant.tasks.model.quantizer import SiteQuantizer

ATTENTION = "prefixquant"
"""Name of our attention function in transformers' registry."""


class Site(nn.Module):
    """A place where a tensor is quantized: passes x on, observed and quantized if so set.

    `observer(x)` sees the tensor before quantization; `enabled` False leaves it in full precision.
    """

    def __init__(self, quantizer: SiteQuantizer | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.enabled = True
        self.observer: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x, on its quantization grid if there is a quantizer and it is enabled."""
        if self.observer is not None:
            self.observer(x)
        return self.quantizer(x) if self.quantizer is not None and self.enabled else x


class SiteNorm(nn.Module):
    """RMSNorm whose output may be a quantization site, shared by the linears that read it."""

    def __init__(self, weight: Tensor, eps: float, site: Site | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self.site = site

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return x / rms(x) * weight, then through the site; the mean square is taken in float32."""
        x = F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)
        return x if self.site is None else self.site(x)


class SiteLinear(nn.Module):
    """Linear whose input may pass an online Hadamard transform and then a quantization site."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        site: Site | None = None,
        hadamard: bool = False,
        hadamard_block: int | None = None,
    ) -> None:
        """`hadamard_block`: channels that the online transform takes together; None: all."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.site = site
        self.hadamard, self.hadamard_block = hadamard, hadamard_block
        self.weight_quantizer: nn.Module | None = None
        """Takes the weight to its grid in every forward while the block is trained; None: the weight is used as is."""

    def prepare(self, x_BTD: Tensor) -> Tensor:
        """Return what the product sees: the input after the online transform and the site."""
        if self.hadamard:
            x_BTD = hadamard_transform(x_BTD, self.hadamard_block)
        return x_BTD if self.site is None else self.site(x_BTD)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the product with the weight, [B, T, O]."""
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return F.linear(self.prepare(x_BTD), weight, self.bias)


class KeySiteBeforeRope(nn.Module):
    """Wraps what makes the keys (k_proj, or the norm after it): they are quantized before the rotary embedding."""

    def __init__(self, inner: nn.Module, site: Site, head_dim: int) -> None:
        super().__init__()
        self.inner = inner
        self.site = site
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the inner module's output [B, T, heads * head_dim] or [B, T, heads, head_dim], through the site."""
        y = self.inner(x)
        heads = y.reshape(*y.shape[:2], -1, self.head_dim).transpose(1, 2)
        return self.site(heads).transpose(1, 2).reshape(y.shape)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Run sdpa attention after R3 on the queries [B, heads, T, head_dim], if the module asks for it.

    The keys got the same rotation when they entered the cache, so the products are those of the unrotated model.
    Without a mask, queries behind a prefix (or a longer cache) see every key up to their own: flash kernels know that
    pattern, while a mask that spells it out keeps them from being used.
    """
    if getattr(module, "rotate_queries", False):
        query = hadamard_transform(query)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is not None or num_queries in (1, num_keys):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = key.to(query.dtype), value.to(query.dtype)  # under autocast the prefix came in float32
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    bias: Any = causal_lower_right(num_queries, num_keys)
    if query.device.type == "cpu":
        bias = bias._materialize()  # what it does there itself, with a warning each time
    output = F.scaled_dot_product_attention(query, key, value, bias, scale=kwargs.get("scaling"))
    return output.transpose(1, 2).contiguous(), None


def causal_or_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return transformers' sdpa mask, or None where `attention` knows the pattern: causal, nothing padded."""
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if plain and kwargs.get("attention_mask") is None and kwargs.get("local_size") is None and not args:
        offset = int(kwargs.get("q_offset", 0)) - int(kwargs.get("kv_offset", 0))
        if kwargs["q_length"] + offset == kwargs["kv_length"]:
            return None
    return sdpa_mask(*args, **kwargs)


def register_attention() -> None:
    """Make `attn_implementation="prefixquant"` known to transformers.

    The mask function must be registered under the same name: without it transformers passes no mask at all, and every
    forward behind a prefix is wrong.
    """
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, causal_or_mask)
