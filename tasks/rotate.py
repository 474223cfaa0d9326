"""Fold the norm gains and rotations of a block into its weights (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406)."""

from dataclasses import dataclass
from typing import Literal

from prefixquant.tasks.errors import ConfigError

Rotation = Literal["hadamard", "orthogonal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RotateConfig:
    """Which rotations are applied. The function of the model stays the same; only its activations flatten."""

    r1: Rotation | None = "hadamard"
    """Residual stream: random-sign Hadamard or random orthogonal matrix, folded into the weights. None: off."""

    r2: Rotation | None = "hadamard"
    """Values of a head, undone in o_proj; folded into the weights, one matrix a block. None: off."""

    r3: bool = True
    """Online Hadamard on queries and keys after the rotary embedding."""

    r4: bool = True
    """Online Hadamard on down_proj's input, undone in its weight."""

    seed: int = 0
    """Seed of the random signs and matrices."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"rotate.seed must not be negative, got {self.seed}")
