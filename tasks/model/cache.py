"""KV cache that starts with the full-precision prefix and quantizes what enters. Letters: B batch, H KV heads, P prefix
tokens, T tokens, C head channels."""

from typing import Any

from prefixquant.kernels.hadamard import hadamard_transform
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class PrefixLayer(DynamicLayer):
    """The cache of one attention module: R3 and the key and value sites of that module act on what `update` receives."""

    def __init__(self, attention: nn.Module, prefix: tuple[Tensor, Tensor] | None, batch_size: int) -> None:
        """Start with prefix keys and values [H, P, C], taken as they are (already rotated), repeated for the batch."""
        super().__init__()
        self._attention = attention
        if prefix is not None and prefix[0].shape[1]:
            keys, values = (part.expand(batch_size, *part.shape) for part in prefix)
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values [B, H, P+T, C], the new ones rotated and quantized."""
        module = self._attention
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
