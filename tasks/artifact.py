"""What a task returns: named tensors, one JSON record and, rarely, whole files. No pickle."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Artifact:
    """The value of one task, ready to be stored."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Stored as one safetensors file, `tensors.safetensors`."""

    record: dict[str, Any] = field(default_factory=dict)
    """Stored as `record.json`; JSON types only."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Stored as they are: tokenizer files, config.json."""

    large_files: dict[str, Path] = field(default_factory=dict)
    """Stored as they are, from files on disk that the task wrote to its scratch folder; read back as `files`."""
