"""Perplexity of a model over token windows, block by block, with the prefix KV in front of each window."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.tasks.errors import ConfigError, NumericalError
from prefixquant.tasks.model.block import Block, Prefix, run_batched
from prefixquant.tasks.rotate import Ends


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityConfig:
    """Protocol: documents joined by blank lines, tokenized once without BOS, cut into windows; mean NLL over the tokens
    2..window of each, exponentiated."""

    window: int = 2048
    """Tokens of a window, the prefix not counted."""

    max_windows: int | None = None
    """Use only the first so many windows. None: all."""

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ConfigError(f"evaluate.window must be at least 2, got {self.window}")
        if self.max_windows is not None and self.max_windows < 1:
            raise ConfigError(f"evaluate.max_windows must be at least 1, got {self.max_windows}")


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measured perplexity."""

    ppl: float
    """exp of the mean negative log-likelihood of a token."""

    tokens: int
    """Tokens predicted."""

    windows: int
    """Windows they come from."""


def perplexity(
    blocks: Iterable[tuple[Block, Prefix | None]],
    ends: Ends,
    eps: float,
    windows_NT: Tensor,
    *,
    device: torch.device,
    batch_tokens: int = 8192,
) -> Perplexity:
    """Return the perplexity of a model whose blocks come one at a time; quantizers act as they are set.

    Only one block and the hidden states of all windows are held.

    Args:
        blocks: the decoder blocks in order, each with its part of the prefix.
        ends: embedding, final gain and head.
        eps: of the final norm.
        windows_NT: token ids, N windows of T tokens.
        device: where to compute; the hidden states stay there if they take less than a quarter of its memory.
        batch_tokens: tokens a forward.

    Raises:
        NumericalError: a block's output is NaN or infinite.
    """
    batch = max(1, batch_tokens // windows_NT.shape[1])
    hidden_NTD = ends.embedding[windows_NT]
    if device.type == "cuda" and hidden_NTD.nbytes < torch.cuda.get_device_properties(device).total_memory / 4:
        hidden_NTD = hidden_NTD.to(device)
    for block, prefix in blocks:
        where = f"evaluation, block {block.index}"
        hidden_NTD = run_batched(partial(block, prefix=prefix), hidden_NTD, batch, device, where)
    gain, head = ends.gain.to(device), ends.head.to(device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for hidden_TD, ids_T in zip(hidden_NTD, windows_NT, strict=True):
        x = hidden_TD.to(device).float()
        x = gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(gain.dtype)
        logits = (x[:-1] @ head.T).float()
        total += F.cross_entropy(logits, ids_T[1:].to(device), reduction="sum")
    return _perplexity(total, windows_NT)


def model_perplexity(model: Any, windows_NT: Tensor, *, batch_tokens: int = 8192) -> Perplexity:
    """Return the perplexity of a whole transformers model, [N, T] windows as they are (the model adds its prefix)."""
    batch = max(1, batch_tokens // windows_NT.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for part in windows_NT.split(batch):
        ids = part.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        for logits_TV, ids_T in zip(logits, ids, strict=True):
            total += F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="sum")
    return _perplexity(total, windows_NT)


def _perplexity(total_nll: Tensor, windows_NT: Tensor) -> Perplexity:
    tokens = windows_NT.shape[0] * (windows_NT.shape[1] - 1)
    mean = float(total_nll) / tokens
    if not math.isfinite(mean):
        raise NumericalError("evaluation: the logits hold NaN or infinite values")
    return Perplexity(ppl=math.exp(min(mean, 700.0)), tokens=tokens, windows=len(windows_NT))
