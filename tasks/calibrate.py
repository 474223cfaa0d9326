"""Collect the per-channel ranges from which static scales start."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.block import Block, block_prefix, run_batched


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """How the ranges of the sequences are averaged."""

    ema: float = 0.99
    """Weight of the past in the running mean of the per-sequence extremes; 0 keeps the last sequence only."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise ConfigError(f"data.statistics.ema must lie in [0, 1), got {self.ema}")


class RangeObserver:
    """Running mean of the per-channel extremes of each sequence at one site."""

    def __init__(self, ema: float) -> None:
        self._ema = ema
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        """Take activations [B, T, channels] or keys/values [B, heads, T, channels]."""
        for low, high in zip(x.amin(-2).float(), x.amax(-2).float(), strict=True):
            self.low = low if self.low is None else torch.lerp(low, self.low, self._ema)
            self.high = high if self.high is None else torch.lerp(high, self.high, self._ema)


Ranges = dict[str, tuple[Tensor, Tensor]]
"""Site name -> per-channel (low, high): [channels] or, for keys and values, [heads, channels]; float32, on the CPU."""


def calibrate_blocks(
    blocks: Iterable[Block],
    prefix: tuple[Tensor, Tensor] | None,
    stream_NTD: Tensor,
    config: CalibrateConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> list[Ranges]:
    """Return the ranges of every block's sites over the real tokens, behind the prefix [L, KV heads, P, head_dim].

    The stream enters the first block; all blocks run in full precision, one held at a time.

    Raises:
        NumericalError: a block's output is NaN or infinite.
    """
    result = []
    for block in blocks:
        observers = {name: RangeObserver(config.ema) for name in block.sites}
        own = block_prefix(prefix, block.index, device)
        with block.only():
            for name, site in block.sites.items():
                site.observer = observers[name]
            stream_NTD = run_batched(
                partial(block, prefix=own),
                stream_NTD,
                batch_size,
                device,
                f"calibration, block {block.index}",
            )
            for site in block.sites.values():
                site.observer = None
        ranges: Ranges = {}
        for name, seen in observers.items():
            assert seen.low is not None
            assert seen.high is not None
            ranges[name] = (seen.low.cpu(), seen.high.cpu())
        result.append(ranges)
        del block  # before the next one is built
    return result
