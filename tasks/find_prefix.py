"""Pick the outlier tokens that become the shared KV prefix (PrefixQuant, arXiv:2410.05265)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.block import Block, run_batched


@dataclass(frozen=True, kw_only=True, slots=True)
class FindPrefixConfig:
    """How the prefix is chosen."""

    tokens: tuple[int, ...] | None = None
    """Token ids to use as they are, in order; () means no prefix. None: search."""

    outlier_ratio: float = 64.0
    """A token whose largest |down_proj input| exceeds this multiple of the sequence's median is an outlier (eta)."""

    max_tokens: int | None = None
    """Longest prefix kept, BOS included. None: as many as the search finds."""

    def __post_init__(self) -> None:
        if self.outlier_ratio <= 1:
            raise ConfigError(f"prefix.outlier_ratio must be above 1, got {self.outlier_ratio}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"prefix.max_tokens must be at least 1, got {self.max_tokens}; use prefix.tokens=[] for none"
            )
        if self.tokens is not None and self.max_tokens is not None:
            raise ConfigError(
                "prefix.tokens and prefix.max_tokens contradict each other: given tokens are not searched"
            )
        if self.tokens is not None and any(token < 0 for token in self.tokens):
            raise ConfigError(f"prefix.tokens must be token ids, got {list(self.tokens)}")


@dataclass(frozen=True, slots=True)
class PrefixChoice:
    """The chosen tokens and the evidence for them."""

    token_ids: tuple[int, ...]
    """In order, BOS last; empty for no prefix."""

    counts: dict[int, int]
    """How often each token was an outlier, position 0 aside, over all sequences and blocks; most frequent first."""

    outliers_per_sequence: tuple[float, ...]
    """Mean number of outlier tokens of a sequence, by block."""

    peak_ratio: tuple[float, ...]
    """Largest peak over median, by block."""


def choose_prefix(token_ids_NT: Tensor, peak_LNT: Tensor, bos_token_id: int, config: FindPrefixConfig) -> PrefixChoice:
    """Return the prefix for N sequences of T tokens whose largest |down_proj input| in L blocks is given.

    A token is an outlier of a block if its peak exceeds `outlier_ratio` times the median peak of its sequence. The
    block with the most outliers a sequence (rounded up) says how many tokens are needed; the most frequent outlier
    tokens are taken, position 0 aside because BOS, which comes last, covers it. A lone candidate seen in fewer than a
    tenth of the sequences is chance and is dropped (arXiv:2410.05265, section 4.2).
    """
    ratio_LNT = peak_LNT / peak_LNT.median(dim=-1, keepdim=True).values.clamp_min(torch.finfo(peak_LNT.dtype).tiny)
    outlier_LNT = ratio_LNT > config.outlier_ratio
    per_sequence_L = outlier_LNT.sum(-1).float().mean(-1)
    needed = math.ceil(per_sequence_L.max().item())

    inner = outlier_LNT.clone()
    inner[..., 0] = False
    ids, counts = token_ids_NT.expand_as(inner)[inner].unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    ranked, ranked_counts = ids[order].tolist(), counts[order].tolist()
    found = dict(zip(ranked, ranked_counts, strict=True))
    sequences_hit = inner.any(0).any(-1).float().mean().item()
    if len(ranked) == 1 and sequences_hit < 0.1:
        ranked = []
    chosen = [token for token in ranked if token != bos_token_id][:needed]
    if config.max_tokens is not None:
        chosen = chosen[: config.max_tokens - 1]
    return PrefixChoice(
        token_ids=(*chosen, bos_token_id),
        counts=found,
        outliers_per_sequence=tuple(per_sequence_L.tolist()),
        peak_ratio=tuple(ratio_LNT.amax((1, 2)).tolist()),
    )


def down_input_peaks(blocks: Iterable[Block], stream_NTD: Tensor, *, batch_size: int, device: torch.device) -> Tensor:
    """Return the largest |down_proj input| of each token before any online transform, [L, N, T] float32.

    The stream enters the first block without a prefix and passes all blocks in full precision, one held at a time.
    """
    peaks = []
    for block in blocks:
        found: list[Tensor] = []

        def observe(_module: nn.Module, inputs: tuple[Tensor, ...], found: list[Tensor] = found) -> None:
            found.append(inputs[0].abs().amax(-1).float().cpu())

        with block.only():
            hook = block.linear(block.family.down).register_forward_pre_hook(observe)
            stream_NTD = run_batched(
                partial(block, prefix=None),
                stream_NTD,
                batch_size,
                device,
                f"prefix search, block {block.index}",
            )
            hook.remove()
        peaks.append(torch.cat(found))
        del block  # before the next one is built
    return torch.stack(peaks)


def prefix_key_values(blocks: Iterable[Block], hidden_PD: Tensor, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return keys and values [L, KV heads, P, head_dim] of the prefix tokens, as they lie in the cache, on the CPU."""
    hidden = hidden_PD.unsqueeze(0).to(device)
    keys, values = [], []
    for block in blocks:
        hidden, (key, value) = block.prefix_states(hidden)
        keys.append(key.cpu())
        values.append(value.cpu())
    return torch.stack(keys), torch.stack(values)
