"""Grid search of the scales of one block: weights, activations, keys and values."""

from dataclasses import dataclass
from typing import Literal

from prefixquant.tasks.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Which scales are searched and over which grid. What is not searched keeps the absmax scale of its statistics."""

    weights: bool = True
    """Search the weight scales, per output channel or group, on the layer's output error."""

    activations: bool = True
    """Search the activation scales (static) or clipping ratios (dynamic) on the output error."""

    keys: bool = True
    """Search the scales or clipping ratios of the keys."""

    values: bool = True
    """Search the scales or clipping ratios of the values."""

    objective: Literal["block", "sublayer"] = "block"
    """Error that activations, keys and values are searched on: of the block's output, or of their sublayer's."""

    inputs: Literal["quantized", "full_precision"] = "quantized"
    """Stream that enters the block during the search. The target is always the full-precision block on its own stream
    when `quantized`, on the same stream when `full_precision`."""

    coarse_points: int = 8
    """Points of the first grid, equally spaced over [min_ratio, max_ratio] of the calibrated range."""

    fine_points: int = 10
    """Points of the second grid, spaced over one coarse step on both sides of the best coarse point. 0: no second grid."""

    min_ratio: float = 0.25
    """Smallest ratio tried."""

    max_ratio: float = 1.0
    """Largest ratio tried."""

    weight_points: int = 20
    """Ratios tried for a weight scale, equally spaced from 1 down to `weight_min_ratio`."""

    weight_min_ratio: float = 0.5
    """Smallest ratio tried for a weight scale."""

    def __post_init__(self) -> None:
        if self.coarse_points < 2 or self.fine_points < 0 or self.weight_points < 1:
            raise ConfigError(
                f"search needs coarse_points >= 2, fine_points >= 0 and weight_points >= 1, "
                f"got {self.coarse_points}, {self.fine_points} and {self.weight_points}"
            )
        if not 0 < self.min_ratio < self.max_ratio:
            raise ConfigError(f"search needs 0 < min_ratio < max_ratio, got {self.min_ratio} and {self.max_ratio}")
        if not 0 < self.weight_min_ratio <= 1:
            raise ConfigError(f"search.weight_min_ratio must lie in (0, 1], got {self.weight_min_ratio}")
