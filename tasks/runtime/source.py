"""Where the runtime's models come from: what a block consists of, one block at a time."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from prefixquant.tasks.export import (
    ENDS_FILE,
    PREFIX_FILE,
    block_file,
    read_config,
    read_description,
    read_quantize_config,
    read_shard,
)
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.families import find_family
from prefixquant.tasks.model.quantizer import QuantizedWeight
from prefixquant.tasks.model.saved import saved_weights
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig


class Source(Protocol):
    """A quantized model, read block by block."""

    config: Any
    quantize: QuantizeConfig
    transforms: OnlineTransforms
    prefix_token_ids: list[int]

    def block(self, index: int) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return a block's integer weights by linear, and all its other tensors by block-relative name."""

    def ends(self) -> dict[str, Tensor]:
        """Return embedding, final norm and head by name."""

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the prefix [L, H, P, C], or None."""


class FolderSource:
    """A folder that `prefixquant run --out` wrote."""

    def __init__(self, folder: Path) -> None:
        """Read its description. Raises CheckpointError if a file is missing or damaged."""
        description = read_description(folder)
        self._folder = folder
        self.config = read_config(folder)
        self.quantize = read_quantize_config(description["quantize"])
        self.transforms = OnlineTransforms(**description["transforms"])
        self.prefix_token_ids: list[int] = description["prefix_token_ids"]

    def block(self, index: int) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return a block's integer weights by linear, and all its other tensors by block-relative name."""
        family = find_family(self.config.model_type)
        stored = read_shard(self._folder / block_file(index))
        weights = saved_weights(stored, block_shapes(self.config, 0), family, index, self.quantize.weights)
        return weights, {name.removeprefix(family.block_prefix(index)): tensor for name, tensor in stored.items()}

    def ends(self) -> dict[str, Tensor]:
        """Return embedding, final norm and head by name."""
        return read_shard(self._folder / ENDS_FILE)

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the prefix [L, H, P, C], or None."""
        if not self.prefix_token_ids:
            return None
        stored = read_shard(self._folder / PREFIX_FILE)
        return stored["keys"], stored["values"]
