"""Read calibration and evaluation texts and cut them into token windows."""

from dataclasses import dataclass
from typing import Literal

from prefixquant.tasks.errors import ConfigError

NAMED_SETS = ("pile", "wikitext2", "c4", "redpajama", "python-docs")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowsConfig:
    """Token windows drawn at random from a text."""

    count: int
    """Number of windows."""

    length: int
    """Tokens of a window."""

    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.length < 2:
            raise ConfigError(f"token windows need count >= 1 and length >= 2, got {self.count} and {self.length}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """A text: a named set or a local file."""

    source: str
    """One of `NAMED_SETS`, or the path of a .txt, .jsonl or .parquet file (one document a line or row)."""

    split: Literal["calibration", "validation", "evaluation"] = "evaluation"
    """Part of a named set. A local file given for calibration: its first 90 % of documents calibrate, the rest validate;
    given for evaluation: all of it."""

    revision: str | None = None
    """Dataset revision of a named set; part of the artifact key."""
