"""Collect the per-channel ranges from which static scales start."""

from dataclasses import dataclass

from prefixquant.tasks.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """How the ranges of the sequences are averaged."""

    ema: float = 0.99
    """Weight of the past in the running mean of the per-sequence extremes; 0 keeps the last sequence only."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise ConfigError(f"data.statistics.ema must lie in [0, 1), got {self.ema}")
