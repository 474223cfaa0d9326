"""`generate` behind the prefix, for models whose quantization is simulated. P prefix tokens."""

from typing import Any

import torch
from torch import Tensor

from prefixquant.tasks.model.cache import CACHE_NAMES, cache_name, prefix_cache_for


class PrefixGeneration:
    """A transformers model whose `generate` starts behind the prefix: prompts go in and come out without its tokens.

    Transformers wants the ids of all that a cache holds, so within `generate` the prefix's stand in front: logits
    processors, stopping criteria and streamers see them.
    """

    prefix_token_ids: list[int]

    @classmethod
    def become(cls, model: Any, prefix_token_ids: list[int]) -> None:
        """Make a model that `attach_prefix` has seen one of these, in place; it stays one of its family's class."""
        model.__class__ = type(type(model).__name__, (cls, type(model)), {})
        model.prefix_token_ids = prefix_token_ids

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, from ids [B, T], padded on the left with an attention mask or not at all.

        A cache of the caller's own, from `prefix_cache_for`, is used as it is: ids then start with the prefix's.

        Raises:
            ValueError: there are no ids to go on from.
        """
        given: Any = super()
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            return given.generate(inputs, *args, **kwargs)
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ValueError("generate behind a prefix takes input_ids, no embeddings, and at least one a sequence")
        front = torch.tensor([self.prefix_token_ids], dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        kwargs["attention_mask"] = torch.cat([mask.new_ones(front.shape), mask], dim=1)
        for name in ("max_length", "min_length"):
            if kwargs.get(name) is not None:
                kwargs[name] += front.shape[1]
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        kwargs[cache_name(self.base_model)] = prefix_cache_for(self, len(ids) * copies)  # type: ignore[attr-defined]
        output = given.generate(torch.cat([front, ids], dim=1), *args, **kwargs)
        if isinstance(output, Tensor):
            return output[:, front.shape[1] :]
        output.sequences = output.sequences[:, front.shape[1] :]
        return output
