"""Perplexity of a model over token windows, block by block or whole, with the prefix KV in front of each window.

What is measured of a window does not depend on the others, so windows may be shared out: a share is whole batches of
consecutive windows (`share_of`), and the shares' values in order (`merge_perplexity`) are those of one run, to the bit.
"""

import math
from collections.abc import Iterable, Sequence
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


BATCH_TOKENS = 2048
"""Tokens of one forward. Part of the result's last digits, so it is no setting: shares cut between batches."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measured perplexity."""

    ppl: float
    """exp of the mean negative log-likelihood of a token."""

    tokens: int
    """Tokens predicted."""

    windows: int
    """Windows they come from."""


def windows_a_batch(window: int, batch_tokens: int = BATCH_TOKENS) -> int:
    """Return how many windows of so many tokens go through a block at once."""
    return max(1, batch_tokens // window)


def share_of(windows_NT: Tensor, shard: int, shards: int, *, batch_tokens: int = BATCH_TOKENS) -> Tensor:
    """Return the windows of one of `shards` shares, as even as whole batches allow; perhaps none."""
    count, window = windows_NT.shape
    batch = windows_a_batch(window, batch_tokens)
    batches = math.ceil(count / batch)
    return windows_NT[batch * (shard * batches // shards) : batch * ((shard + 1) * batches // shards)]


def merge_perplexity(shares: Sequence[Tensor], window: int) -> Perplexity:
    """Return the perplexity of windows whose negative log-likelihoods [N] come in shares, in order.

    Raises:
        NumericalError: the model put out NaN or infinite values.
    """
    nll_N = torch.cat(list(shares)).tolist()
    tokens = len(nll_N) * (window - 1)
    if not all(map(math.isfinite, nll_N)):
        raise NumericalError("evaluation: the logits hold NaN or infinite values")
    return Perplexity(ppl=math.exp(min(math.fsum(nll_N) / tokens, 700.0)), tokens=tokens, windows=len(nll_N))


def perplexity(
    blocks: Iterable[tuple[Block, Prefix | None]],
    ends: Ends,
    eps: float,
    windows_NT: Tensor,
    *,
    device: torch.device,
    batch_tokens: int = BATCH_TOKENS,
) -> Perplexity:
    """Return the perplexity of a model whose blocks come one at a time, see `block_nlls`."""
    nll_N = block_nlls(blocks, ends, eps, windows_NT, device=device, batch_tokens=batch_tokens)
    return merge_perplexity([nll_N], windows_NT.shape[1])


def block_nlls(
    blocks: Iterable[tuple[Block, Prefix | None]],
    ends: Ends,
    eps: float,
    windows_NT: Tensor,
    *,
    device: torch.device,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """Return the negative log-likelihood of the tokens 2..T of each window, summed: [N] float64, on the CPU.

    Blocks come one at a time and their quantizers act as they are set; only one of them and the hidden states of all
    windows are held.

    Args:
        blocks: the decoder blocks in order, each with its part of the prefix; not touched if there are no windows.
        ends: embedding, final gain and head.
        eps: of the final norm.
        windows_NT: token ids, N windows of T tokens.
        device: where to compute; the hidden states stay there if they take less than a quarter of its memory.
        batch_tokens: tokens a forward.

    Raises:
        NumericalError: a block's output is NaN or infinite.
    """
    if not len(windows_NT):
        return torch.empty(0, dtype=torch.float64)
    batch = windows_a_batch(windows_NT.shape[1], batch_tokens)
    hidden_NTD = ends.embedding[windows_NT]
    if device.type == "cuda" and hidden_NTD.nbytes < torch.cuda.get_device_properties(device).total_memory / 4:
        hidden_NTD = hidden_NTD.to(device)
    for block, prefix in blocks:
        where = f"evaluation, block {block.index}"
        hidden_NTD = run_batched(partial(block, prefix=prefix), hidden_NTD, batch, device, where)
    gain, head = ends.gain.to(device), ends.head.to(device)
    nlls = []
    for hidden_TD, ids_T in zip(hidden_NTD, windows_NT, strict=True):
        x = hidden_TD.to(device).float()
        x = gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(gain.dtype)
        nlls.append(_nll(x[:-1] @ head.T, ids_T.to(device)))
    return torch.stack(nlls).cpu()


def model_perplexity(model: Any, windows_NT: Tensor, *, batch_tokens: int = BATCH_TOKENS) -> Perplexity:
    """Return the perplexity of a whole transformers model, see `model_nlls`."""
    return merge_perplexity([model_nlls(model, windows_NT, batch_tokens=batch_tokens)], windows_NT.shape[1])


@torch.no_grad()
def model_nlls(model: Any, windows_NT: Tensor, *, batch_tokens: int = BATCH_TOKENS) -> Tensor:
    """Return what `block_nlls` does of a whole transformers model over [N, T] windows; it adds its own prefix."""
    nlls = []
    for part in windows_NT.split(windows_a_batch(windows_NT.shape[1], batch_tokens)) if len(windows_NT) else ():
        ids = part.to(model.device)
        logits_BTV = model(input_ids=ids).logits
        nlls += [_nll(logits_TV[:-1], ids_T) for logits_TV, ids_T in zip(logits_BTV, ids, strict=True)]
    return torch.stack(nlls).cpu() if nlls else torch.empty(0, dtype=torch.float64)


def _nll(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of the tokens 2..T, given the logits before each of them."""
    targets = ids_T[1:].to(logits_TV.device)
    return F.cross_entropy(logits_TV.float(), targets, reduction="none").double().sum()
