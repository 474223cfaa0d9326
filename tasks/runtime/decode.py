"""One more token as a CUDA graph: recorded once for a cache, then replayed. B sequences, V vocabulary."""

from typing import Any

import torch
from torch import Tensor

from prefixquant.tasks.model.cache import CACHE_NAMES, cache_name
from prefixquant.tasks.runtime.cache import PackedCache

_HANDLED = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", *CACHE_NAMES}
"""Arguments of a forward that a recorded step can do without or follow."""


class DecodeGraph:
    """The step that a cache's next token takes. It holds as long as the cache need not grow."""

    def __init__(self, model: Any, cache: PackedCache) -> None:
        self._model, self._cache, self.places = model, cache, cache.places
        device = cache.place.device
        self._ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        self._name = cache_name(model.base_model)
        self._graph = torch.cuda.CUDAGraph()
        filled = cache.filled
        with torch.cuda.graph(self._graph):
            self._output = self._eager(self._ids, self._positions)
        cache.filled = filled  # recording takes no step

    @staticmethod
    def of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "DecodeGraph | None":
        """Return the graph that does a forward with these arguments, or None if none does.

        The first step over a cache, and the first after it grew, run without: they load the kernels.
        """
        cache = next((kwargs[each] for each in CACHE_NAMES if kwargs.get(each) is not None), None)
        ids = args[0] if args else kwargs.get("input_ids")
        if (
            not isinstance(cache, PackedCache)
            or ids is None
            or not ids.is_cuda
            or ids.shape != (cache.batch, 1)
            or len(args) > 1
            or any(value is not None and value is not False and name not in _HANDLED for name, value in kwargs.items())
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.cuda.is_current_stream_capturing()
            or not cache.has_room(1)
        ):
            return None
        graph = cache.decode_graph
        if graph is None or graph.places != cache.places:
            if cache.stepped_at != cache.places:
                cache.stepped_at = cache.places
                return None
            graph = cache.decode_graph = DecodeGraph(model, cache)
        return graph

    def _eager(self, ids: Tensor, positions: Tensor) -> Any:
        return self._model.forward(input_ids=ids, position_ids=positions, **{self._name: self._cache})

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the step; the output's logits [B, 1, V] are valid until the next."""
        self._ids.copy_(args[0] if args else kwargs["input_ids"])
        positions = kwargs.get("position_ids")
        if positions is None:
            self._positions.fill_(self._cache.filled)
        else:
            self._positions.copy_(positions.expand(self._ids.shape))
        self._graph.replay()
        self._cache.end(1)
        return self._output
