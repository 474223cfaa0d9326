"""Pick the outlier tokens that become the shared KV prefix (PrefixQuant, arXiv:2410.05265)."""

from dataclasses import dataclass

from prefixquant.tasks.errors import ConfigError


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
            raise ConfigError(f"prefix.max_tokens must be at least 1, got {self.max_tokens}; use prefix.tokens=[] for none")
        if self.tokens is not None and self.max_tokens is not None:
            raise ConfigError("prefix.tokens and prefix.max_tokens contradict each other: given tokens are not searched")
        if self.tokens is not None and any(token < 0 for token in self.tokens):
            raise ConfigError(f"prefix.tokens must be token ids, got {list(self.tokens)}")
