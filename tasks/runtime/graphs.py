"""Forwards as CUDA graphs, which take the host no time: one more token, and prompts of a length seen before.

Letters: B sequences, T tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from prefixquant.kernels.workspace import recording
from prefixquant.tasks.model.cache import CACHE_NAMES, cache_name
from prefixquant.tasks.runtime.cache import PackedCache

LARGEST_PROMPT = 4096
"""Tokens of all sequences together up to which prompts are recorded; larger ones take the GPU longer than the host."""

KEPT_PROMPTS = 4
"""Lengths of prompts whose graphs are kept, the last used ones."""

_HANDLED = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", *CACHE_NAMES}
"""Arguments of a forward that a recorded one can do without or follow."""


class Call:
    """A forward's arguments, as far as recorded forwards look at them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids: Any = args[0] if args else kwargs.get("input_ids")
        self.cache = next((kwargs[each] for each in CACHE_NAMES if kwargs.get(each) is not None), None)
        self.positions, self.mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        self.keep = kwargs.get("logits_to_keep", 0)
        others = (value for name, value in kwargs.items() if name not in _HANDLED)
        self.recordable = (
            isinstance(self.ids, Tensor)
            and self.ids.is_cuda
            and self.ids.ndim == 2
            and len(args) <= 1
            and not any(value is not None and value is not False for value in others)
            and kwargs.get("return_dict") is not False
            and isinstance(self.keep, int)
            and (self.cache is None or (isinstance(self.cache, PackedCache) and self.cache.batch == len(self.ids)))
            and not torch.is_grad_enabled()
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch.cuda.is_current_stream_capturing()
        )


class DecodeGraph:
    """The step that a cache's next token takes. It holds as long as the cache need not grow."""

    def __init__(self, model: Any, cache: PackedCache) -> None:
        self._cache, self.places = cache, cache.places
        device = cache.place.device
        self._ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(cache.batch, 1, dtype=torch.long, device=device)
        self._graph = torch.cuda.CUDAGraph()
        filled = cache.filled
        with recording(self._graph):
            self._output = model.forward(
                input_ids=self._ids, position_ids=self._positions, **{cache_name(model.base_model): cache}
            )
        cache.filled = filled  # recording takes no step

    @staticmethod
    def of(model: Any, call: Call) -> "DecodeGraph | None":
        """Return the graph that does a forward, or None if none does.

        The first step over a cache, and the first after it grew, run without: they load the kernels.
        """
        cache = call.cache
        if not call.recordable or cache is None or call.ids.shape[1] != 1 or not cache.filled or not cache.has_room(1):
            return None
        if cache.padded_behind:  # the forward refuses it
            return None
        graph: DecodeGraph | None = cache.decode_graph
        if graph is None or graph.places != cache.places:
            if cache.stepped_at != cache.places:
                cache.stepped_at = cache.places
                return None
            graph = cache.decode_graph = DecodeGraph(model, cache)
        return graph

    def run(self, call: Call) -> Any:
        """Take the step; the output's logits [B, 1, V] are valid until the next."""
        self._ids.copy_(call.ids)
        if call.positions is None:
            self._positions.fill_(self._cache.filled)
            if self._cache.start is not None:
                self._positions.sub_(self._cache.start.unsqueeze(1))
        else:
            self._positions.copy_(call.positions.expand(self._ids.shape))
        self._graph.replay()
        self._cache.end(1)
        return self._output


class PromptGraph:
    """A prompt's way through the blocks, for prompts of up to T tokens. What fills it up lies behind the prompt, where
    no token of it looks."""

    def __init__(self, model: Any, batch: int, tokens: int, pool: Any) -> None:
        device = model.lm_head.weight.device
        self._ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        self._cache = model.new_cache(batch, tokens)
        inputs = {"input_ids": self._ids, cache_name(model.base_model): self._cache}
        model.base_model(**inputs)  # loads what it needs
        self._cache.clear()
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph, pool=pool):
            self._hidden = model.base_model(**inputs).last_hidden_state

    def run(self, model: Any, call: Call) -> Any:
        """Return what the forward returns, the prompt's codes in the cache of the call or in a new one."""
        batch, tokens = call.ids.shape
        self._ids[:, :tokens] = call.ids
        self._cache.clear()  # the counters are set on the device, where the graph advances them
        self._graph.replay()
        cache = model.new_cache(batch, tokens) if call.cache is None else call.cache
        cache.take(self._cache, tokens)
        logits = model.lm_head(self._hidden[:, max(0, tokens - call.keep) if call.keep else 0 : tokens])
        return CausalLMOutputWithPast(logits=logits, **{cache_name(model.base_model): cache})


class PromptGraphs:
    """The recorded prompts of a model. A length is recorded when it comes a second time."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], PromptGraph | None] = {}
        self._pool: Any = None

    def of(self, model: Any, call: Call) -> PromptGraph | None:
        """Return the graph that does a forward, or None if none does."""
        if not call.recordable or call.ids.shape[1] == 1 or (call.cache is not None and call.cache.filled):
            return None
        batch, tokens = call.ids.shape
        if batch * tokens > LARGEST_PROMPT or (call.positions is not None and not _plain(call.positions)):
            return None
        if call.mask is not None and not bool(call.mask.all()):
            return None
        key = batch, _filled_up(tokens)
        seen = key in self._graphs
        graph = self._graphs.pop(key, None)
        if seen and graph is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()  # one after the other, they share their memory
            graph = PromptGraph(model, *key, self._pool)
        self._graphs[key] = graph
        while len(self._graphs) > KEPT_PROMPTS:
            self._graphs.pop(next(iter(self._graphs)))
        return graph


def _plain(positions: Tensor) -> bool:
    return bool((positions == torch.arange(positions.shape[1], device=positions.device)).all())


def _filled_up(tokens: int) -> int:
    """Return the tokens of the graph for a prompt: a power of two up to 256, then a multiple of 256."""
    return -(-tokens // 256) * 256 if tokens > 256 else max(16, 1 << (tokens - 1).bit_length())
