"""KV cache that starts with the full-precision prefix and quantizes what enters. Letters: B batch, H KV heads, P prefix
tokens, T tokens, C head channels."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from prefixquant.kernels.hadamard import hadamard_transform

CACHE_NAMES = ("cache", "past_key_values")
"""What a model's forward calls its KV cache: the first since transformers 5.24."""


def cache_name(base: nn.Module) -> str:
    """Return what the forward of a base model (the one without head) calls its KV cache."""
    return CACHE_NAMES[0] if CACHE_NAMES[0] in signature(base.forward).parameters else CACHE_NAMES[1]


class PrefixLayer(DynamicLayer):
    """The cache of one attention module: its R3 and its key and value sites act on what `update` receives."""

    def __init__(self, attention: nn.Module, prefix: tuple[Tensor, Tensor] | None, batch_size: int) -> None:
        """Start with prefix keys and values [H, P, C], taken as they are (already rotated), repeated for the batch."""
        super().__init__()
        self._attention: Any = attention
        if prefix is not None and prefix[0].shape[1]:
            keys, values = (part.expand(batch_size, *part.shape) for part in prefix)
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values [B, H, P+T, C], the new ones rotated and quantized."""
        module = self._attention
        if self.is_initialized and self.keys.device != key_states.device:  # of a model that is spread over several
            self.keys, self.values = self.keys.to(key_states.device), self.values.to(key_states.device)
        if module.rotate_queries:
            key_states = hadamard_transform(key_states)
        return super().update(module.key_site(key_states), module.value_site(value_states), *args, **kwargs)


def prefix_cache(attentions: list[nn.Module], prefix: tuple[Tensor, Tensor] | None, batch_size: int) -> Cache:
    """Return a fresh cache for one forward; prefix keys and values are [layers, H, P, C]. `update` mutates it."""
    layers = []
    for index, attention in enumerate(attentions):
        own = None if prefix is None else (prefix[0][index], prefix[1][index])
        layers.append(PrefixLayer(attention, own, batch_size))
    return Cache(layers=layers)


def attach_prefix(base: nn.Module, attentions: list[nn.Module], prefix: tuple[Tensor, Tensor] | None) -> None:
    """Make a base model (the one without head) start every forward without a cache behind the prefix.

    A 2-d attention mask is extended over the prefix, and padding on the left takes no positions: how far the prefix is
    from a token would depend on it. Positions given without a cache count from the first token behind the prefix. A
    cache given by the caller must come from `prefix_cache_for`; mask and positions then count what it holds.
    """
    num_prefix_tokens = 0 if prefix is None else prefix[0].shape[2]

    def start_behind_prefix(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if given is not None:
            if not all(isinstance(layer, PrefixLayer) for layer in given.layers) or not given.layers:
                raise ValueError(
                    "this model's KV cache quantizes what enters and starts with the prefix; "
                    "pass past_key_values=prefix_cache_for(model, batch_size), in `generate` with the prefix's ids in "
                    "front of the prompt; or no cache"
                )
            return args, kwargs
        tokens = args[0] if args else kwargs.get("input_ids")
        batch, count = (tokens if tokens is not None else kwargs["inputs_embeds"]).shape[:2]
        kwargs |= {cache_name(base): prefix_cache(attentions, prefix, batch), "use_cache": True}
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.dim() == 2:
            mask = torch.cat([mask.new_ones(batch, num_prefix_tokens), mask], dim=1)
            kwargs["attention_mask"] = mask
            if positions is None:
                kwargs["position_ids"] = (mask.cumsum(1) - 1)[:, -count:]
        if positions is not None:
            kwargs["position_ids"] = positions + num_prefix_tokens
        return args, kwargs

    vars(base)["new_prefix_cache"] = lambda batch_size: prefix_cache(attentions, prefix, batch_size)
    base.register_forward_pre_hook(start_behind_prefix, with_kwargs=True)


def prefix_cache_for(model: Any, batch_size: int) -> Cache:
    """Return a fresh cache of a model from `load_quantized`, holding the prefix.

    For `generate`, which expects the ids of what is in the cache: put the prefix's token ids in front of the prompt.
    """
    return model.base_model.new_prefix_cache(batch_size)
