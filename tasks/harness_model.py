"""A transformers model as lm-eval asks it, with the prefix in front of every request.

lm-eval knows one place for a start token: the request. Here it is in the prefix, so

- requests are tokenized without BOS where the prefix holds it: there is one BOS, not two;
- where lm-eval puts the start token itself, as context of a request without one, it stands for the prefix's own: the
  model does not see it again, and what it predicts is what the last prefix token predicts;
- positions, and the longest request, count the prefix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from prefixquant.tasks.evaluate import BATCH_TOKENS
from prefixquant.tasks.harness import Request, quiet_lm_eval
from prefixquant.tasks.model.cache import cache_name, prefix_cache_for
from prefixquant.tasks.model.whole import holds_prefix, unquantized_logits

_MAX_BATCH = 64


class PrefixModel(HFLM):
    """lm-eval's Hugging Face model, made of a loaded one."""

    _model: Any

    def __init__(self, model: Any, tokenizer: Any, prefix_token_ids: Sequence[int] = ()) -> None:
        """Take a causal model, its tokenizer and the ids of the prefix that it puts in front by itself."""
        self._prefix = torch.tensor(prefix_token_ids, dtype=torch.long)
        self._start: int | None = None
        bos = tokenizer.bos_token_id
        if holds_prefix(model) and len(self._prefix):
            last = int(self._prefix[-1])
            if last == bos or (bos is None and last in tokenizer.all_special_ids):
                self._start, self._start_logits = last, unquantized_logits(model, self._prefix)
        with quiet_lm_eval():  # it warns of being given a loaded model
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=1,
                add_bos_token=False if bos in prefix_token_ids else None,
                prefix_token_id=self._start,
            )

    @property
    def max_length(self) -> int:
        """Longest request, in tokens."""
        return super().max_length - len(self._prefix)

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        """Return the answers to requests of one kind, in JSON types."""
        kind = requests[0].kind
        longest = max(len(self.tok_encode("".join(filter(_is_text, each.arguments)))) for each in requests)
        self.batch_size_per_gpu = max(1, min(_MAX_BATCH, BATCH_TOKENS // max(1, min(longest, self.max_length))))
        instances = [Instance(kind, {}, tuple(each.arguments), 0, (each.task, each.document, 1)) for each in requests]
        answers = getattr(self, kind)(instances, disable_tqdm=True)
        return [list(each) if isinstance(each, tuple) else each for each in answers]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits [B, T, V] of right-padded requests [B, T]."""
        if self._start is None:
            return super()._model_call(inps, attn_mask, labels)
        starts_B = inps[:, 0] == self._start
        if not starts_B.any():
            return super()._model_call(inps)
        # Such a request loses its start token; the last place then holds something that nobody reads.
        moved_BT = torch.where(starts_B[:, None], inps.roll(-1, dims=1), inps)
        logits_BTV = super()._model_call(moved_BT)
        first_B1V = self._start_logits.to(logits_BTV).expand(len(inps), 1, -1)
        return torch.where(starts_B[:, None, None], torch.cat([first_B1V, logits_BTV[:, :-1]], dim=1), logits_BTV)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Return contexts [B, T], padded on the left, with what the model writes behind them."""
        if not holds_prefix(self.model) and not self._is_adapted:
            return super()._model_generate(context, max_length, stop, **settings)
        batch, prefix = len(context), len(self._prefix)
        mask = settings.pop("attention_mask", torch.ones_like(context))
        whole = self._model
        if self._is_adapted:
            # PEFT's own generate hands the cache over under a name that transformers 5.24 no longer looks at.
            self._model, cache = whole.get_base_model(), whole.get_prompt(batch)
        else:
            cache = prefix_cache_for(whole, batch)
        try:
            output = super()._model_generate(
                torch.cat([self._prefix.to(context).expand(batch, -1), context], dim=1),
                max_length + prefix,
                stop,
                attention_mask=torch.cat([mask.new_ones(batch, prefix), mask], dim=1),
                **{cache_name(self._model.base_model): cache},
                **settings,
            )
        finally:
            self._model = whole
        return output[:, prefix:]

    @property
    def _is_adapted(self) -> bool:
        """Whether the prefix is a PEFT adapter's."""
        return hasattr(self._model, "get_prompt")


def _is_text(value: object) -> bool:
    return isinstance(value, str)
