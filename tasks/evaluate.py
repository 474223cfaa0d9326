"""Perplexity of a model over token windows, block by block, with the prefix KV in front of each window."""

from dataclasses import dataclass

from prefixquant.tasks.errors import ConfigError


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
