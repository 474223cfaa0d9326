"""The KV cache of the runtime: packed 4-bit codes, the full-precision prefix apart.

Letters: L blocks, B batch, H KV heads, S places, C channels of a head, P prefix tokens, T tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

GROWTH = 256
"""Places are added in multiples of it."""


class PackedLayer(CacheLayerMixin):
    """Keys and values of one block, parts of the cache's codes. Attention writes and reads them itself."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: "PackedCache", index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        self.look_again()
        self.is_initialized = True

    def look_again(self) -> None:
        """Take the tensors from the cache, which has new ones."""
        self.keys, self.values = self._cache.codes[self._index]

    def lazy_initialization(self, *args: Any) -> None:
        """Do nothing: the constructor did it."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: values come in through the attention of the runtime."""
        raise RuntimeError("the packed cache is written by the model it was made for; make it with model.new_cache()")

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """Return how many keys a mask would cover, and the first."""
        tokens = query if isinstance(query, int) else query.shape[0]
        return self._cache.filled + tokens, 0

    def get_seq_length(self) -> int:
        """Return the filled places, without the prefix."""
        return self._cache.filled

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.24


class PackedCache(Cache):
    """What the model has seen of a batch. It grows as needed; `reserve` sets the room up at once."""

    def __init__(self, batch: int, blocks: int, heads: int, channels: int, device: torch.device) -> None:
        self.batch = batch
        self.codes = torch.zeros(blocks, 2, batch, heads, 0, channels // 2, dtype=torch.uint8, device=device)
        """Keys and values [L, 2, B, H, S, C / 2]."""
        self.filled = 0
        """Places filled, as the host knows it."""
        self.place = torch.zeros(1, dtype=torch.int32, device=device)
        """The first place of the tokens under way."""
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        """Places filled once they are in."""
        self.start: Tensor | None = None
        """int32 [B]: the first place of each sequence that is no padding; None: 0."""
        self.decode_graph: Any = None
        """The recorded step of one more token, if there is one (`runtime.graphs`)."""
        self.stepped_at = -1
        """The number of places when such a step last ran without being recorded."""
        super().__init__(layers=[PackedLayer(self, index) for index in range(blocks)])

    @property
    def places(self) -> int:
        """How many places there are."""
        return int(self.codes.shape[4])

    def has_room(self, tokens: int) -> bool:
        """Return whether so many more tokens fit without growing."""
        return self.filled + tokens <= self.places

    def reserve(self, places: int) -> None:
        """Have at least so many places; one that grows a second time doubles, since a recorded step goes with it."""
        if places <= self.places:
            return
        wanted = max(places, 2 * self.places) if self.decode_graph is not None else places
        old = self.codes
        self.codes = old.new_zeros(*old.shape[:4], -(-wanted // GROWTH) * GROWTH, old.shape[5])
        self.codes[:, :, :, :, : old.shape[4]] = old
        for layer in self.layers:
            layer.look_again()

    def begin(self, tokens: int) -> None:
        """Make room for the next tokens and set the counters that kernels read."""
        self.reserve(self.filled + tokens)
        self.place.copy_(self.length)
        self.length += tokens

    def end(self, tokens: int) -> None:
        """Count the tokens as seen."""
        self.filled += tokens

    def clear(self) -> None:
        """Forget all tokens."""
        self.filled = 0
        self.length.zero_()

    def take(self, other: "PackedCache", tokens: int) -> None:
        """Have, in an empty cache, the first tokens of another."""
        self.begin(tokens)
        self.codes[:, :, :, :, :tokens] = other.codes[:, :, :, :, :tokens]
        self.end(tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the filled places, without the prefix."""
        return self.filled
