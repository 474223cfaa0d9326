"""Modules that take the place of a block's linears and norms. Letters: B batch, T tokens, D channels, O outputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from prefixquant.kernels.hadamard import hadamard_fake_quantize, hadamard_transform
from prefixquant.tasks.model.code_product import LARGEST_BITS, code_product, fits_fp8
from prefixquant.tasks.model.quantizer import SiteQuantizer, product_dtype
from prefixquant.tasks.model.sharded_product import sharded_product

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

    @property
    def is_static_tensor(self) -> bool:
        """Whether all it does is to quantize on one fixed symmetric grid, as the transform before it can as well."""
        quantizer = self.quantizer
        if quantizer is None or self.observer is not None or not self.enabled:
            return False
        spec = quantizer.spec
        return spec.mode == "static" and spec.symmetric and quantizer.parameter_shape() == ()

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
        self.weight_on_grid: Tensor | None = None
        """What it returned, if that was computed ahead of the forward (`Block.weights_on_grid`)."""
        self.codes_on_grid: Tensor | None = None
        """The codes of that in fp8, if the product is to be made of codes."""
        self.shard: tuple[int, Tensor] | None = None
        """Number under which several processes hold the weight together, and the token (`sharded_product`)."""

        self.code_site: tuple[Site] | None = None
        """Where the input was quantized, if the product is to be made of codes (`StepWays.code_products`). In a tuple,
        for it is no part of this module."""

    def prepare(self, x_BTD: Tensor) -> Tensor:
        """Return what the product sees: the input after the online transform and the site."""
        if self.hadamard:
            if self.hadamard_block is None and self.site is not None and self.site.is_static_tensor:
                quantizer: Any = self.site.quantizer
                scale = quantizer.scale.view(())  # DeepSpeed makes [1] of a scalar
                return hadamard_fake_quantize(x_BTD, scale, *quantizer.code_range)
            x_BTD = hadamard_transform(x_BTD, self.hadamard_block)
        return x_BTD if self.site is None else self.site(x_BTD)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the product with the weight, [B, T, O]."""
        x_BTD = self.prepare(x_BTD)
        if self.shard is not None:
            number, token = self.shard
            return sharded_product(x_BTD, self.bias, token, number, self.out_features)
        weight = self.weight if self.weight_on_grid is None else self.weight_on_grid
        if self.weight_on_grid is None and self.weight_quantizer is not None:
            weight = self.weight_quantizer(self.weight)
        if self.code_site is not None and self.codes_on_grid is not None:
            grids: list[Any] = [self.code_site[0].quantizer, self.weight_quantizer]
            y_BTO = code_product(x_BTD, weight, self.codes_on_grid, *(each.scale for each in grids))
            return y_BTO if self.bias is None else y_BTO + self.bias.to(y_BTO.dtype)
        return F.linear(x_BTD, weight, self.bias)

    @property
    def multiplies_codes(self) -> bool:
        """Whether the product is to be made of codes, and can be, under the present autocast."""
        if self.code_site is None or self.weight_quantizer is None or not self.code_site[0].is_static_tensor:
            return False
        x: Any = self.code_site[0].quantizer
        weight: Any = self.weight_quantizer
        spec = weight.spec
        on_grids = max(x.spec.bits, spec.bits) <= LARGEST_BITS and spec.symmetric and spec.granularity == "channel"
        return on_grids and fits_fp8(self.weight, product_dtype(self.weight))


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
    padded = torch.is_grad_enabled() and getattr(module, "pads_queries", False)
    function = _causal_padded if padded else _causal_lower_right
    output = function(query, key, value, kwargs.get("scaling"))
    return output.transpose(1, 2).contiguous(), None


def _causal_lower_right(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Return attention in which the last query sees every key, the one before it all but the last, and so on."""
    if _suits_flash(query):
        # What sdpa with a lower-right bias calls, but grouped heads stay grouped and torch.compile sees no subclass.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, True, return_debug_mask=False, scale=scale)[0]
    key, value = _ungrouped(query, key, value)
    num_queries, num_keys = query.shape[2], key.shape[2]
    bias: Any
    if query.is_cuda:
        bias = causal_lower_right(num_queries, num_keys)
    else:  # what it would make of it, with a warning each time
        bias = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale)


def _causal_padded(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Return the same by the plain causal mask: with queries in front, one for each key more, that nobody looks at."""
    more = key.shape[2] - query.shape[2]
    padded = F.pad(query.transpose(1, 2), (0, 0, 0, 0, more, 0)).transpose(1, 2)  # as it lies, behind a linear
    if not _suits_flash(query):  # other kernels take no grouped heads
        key, value = _ungrouped(query, key, value)
    grouped = key.shape[1] < query.shape[1]
    output = F.scaled_dot_product_attention(padded, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return output[:, :, more:]


def _ungrouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _suits_flash(query: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[3] in range(8, 257, 8) and _has_flash()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _has_flash() -> bool:
    cuda: Any = torch.backends.cuda
    return (
        torch.cuda.get_device_capability()[0] >= 8 and cuda.flash_sdp_enabled() and cuda.is_flash_attention_available()
    )


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
