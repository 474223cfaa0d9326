"""A checkpoint on disk whose tensors are read one at a time: a Hugging Face folder or a GGUF file."""

import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from prefixquant.tasks.errors import CheckpointError, UnsupportedModelError
from prefixquant.tasks.model.families import ModelFamily, find_family

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of a tensor without reading it."""

    shape: tuple[int, ...]
    """Sizes, outermost first."""

    dtype: str
    """Name of the stored type, e.g. `BF16` or `Q4_1`."""


class Checkpoint(ABC):
    """Tensors by name, read on demand. Names are Hugging Face's."""

    path: Path
    tensors: dict[str, TensorInfo]
    default_dtype: torch.dtype
    """Type in which the checkpoint's weights are naturally kept."""
    index: dict[str, Any] | None = None
    """What opening the same file again can be spared, as JSON values; None if opening is cheap."""

    @abstractmethod
    def config(self) -> PretrainedConfig:
        """Return the model's config."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU, in its stored type (float32 for quantized GGUF types)."""

    def read_block(self, family: ModelFamily, block: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors of one decoder block, by their name inside the block.

        Old checkpoints hold more than the model has, such as rotary frequencies; that is left aside.
        """
        prefix = family.block_prefix(block)
        return {name: self.read(prefix + name) for name in names}

    def dtype(self, choice: str) -> torch.dtype:
        """Return the type in which blocks are kept: `auto` is the checkpoint's own, else a torch type by name."""
        return self.default_dtype if choice == "auto" else getattr(torch, choice)

    def has_head(self, family: ModelFamily) -> bool:
        """Return whether the head has weights of its own (not tied to the embedding)."""
        return f"{family.head}.weight" in self.tensors


class SafetensorsCheckpoint(Checkpoint):
    """A local folder with config.json and safetensors shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json; a Hugging Face model folder or a .gguf file is expected")
        self._shard_of: dict[str, str] = {}
        self.tensors = {}
        for shard, expected in self._shards().items():
            found = self._header(shard)
            for name, entry in found.items():
                self.tensors[name] = TensorInfo(shape=tuple(entry["shape"]), dtype=entry["dtype"])
                self._shard_of[name] = shard
            missing = sorted(set(expected) - set(found))
            if missing:
                raise CheckpointError(
                    f"{path / shard}: {INDEX_FILE} promises {missing[0]} ({len(missing)} tensors missing); "
                    f"download the shard again"
                )
        weight_of = dict.fromkeys(_FLOATS, 0)
        for info in self.tensors.values():
            if info.dtype in weight_of:
                weight_of[info.dtype] += math.prod(info.shape)
        self.default_dtype = _FLOATS[max(weight_of, key=lambda kind: weight_of[kind])]

    def _header(self, shard: str) -> dict[str, Any]:
        return read_safetensors_header(self.path / shard)

    def _exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def _shards(self) -> dict[str, list[str]]:
        index = self.path / INDEX_FILE
        if index.is_file():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as err:
                raise CheckpointError(f"{index} is not a safetensors index ({err}); download it again") from err
            shards: dict[str, list[str]] = {}
            for name, shard in weight_map.items():
                shards.setdefault(shard, []).append(name)
            return dict(sorted(shards.items()))
        if self._exists(SINGLE_FILE):
            return {SINGLE_FILE: []}
        raise CheckpointError(
            f"{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors weights are read"
        )

    def config(self) -> PretrainedConfig:
        """Return the model's config."""
        path = self.path / "config.json"
        try:
            model_type = json.loads(path.read_text())["model_type"]
        except (ValueError, KeyError, TypeError) as err:
            raise CheckpointError(f"{path} is not a model's config ({err}); download it again") from err
        find_family(model_type)
        return AutoConfig.from_pretrained(self.path, trust_remote_code=False)

    def read(self, name: str) -> Tensor:
        """Return one tensor as stored."""
        shard = self.path / self._shard_of[name]
        try:
            with safe_open(shard, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{shard}: cannot read {name} ({err}); download the shard again") from err


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Return {name: {dtype, shape, data_offsets}} of a safetensors file after checking its length.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the shard again")
    with path.open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return parse_safetensors_header(read, path.stat().st_size, str(path))[0]


def parse_safetensors_header(read: Callable[[int, int], bytes], size: int, where: str) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the byte from which its offsets count.

    Args:
        read: gives the bytes from a start to a stop.
        size: of the file, bytes.
        where: the file's name, for messages.
    Raises:
        CheckpointError: the file is truncated or not a safetensors file.
    """
    start = read(0, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    raw = read(8, 8 + length) if length <= size else b""
    try:
        header = json.loads(raw)
    except ValueError as err:
        raise CheckpointError(f"{where} is truncated or no safetensors file ({size} bytes); download it again") from err
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise CheckpointError(f"{where} is truncated: its header needs {end} bytes, it has {size}; download it again")
    return header, 8 + length


def open_checkpoint(path: Path, index: dict[str, Any] | None = None) -> Checkpoint:
    """Return the checkpoint at a local folder or .gguf file; `index` as an earlier opening of the same bytes had it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from prefixquant.tasks.model.gguf import GGUFCheckpoint  # here: gguf.py builds on this module

    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model folder, a hub id or a .gguf file")
    return GGUFCheckpoint(path, index) if path.suffix == ".gguf" else SafetensorsCheckpoint(path)


def check_checkpoint(checkpoint: Checkpoint) -> tuple[PretrainedConfig, ModelFamily]:
    """Return config and family after comparing every tensor's name and shape with what the config implies.

    Raises:
        UnsupportedModelError: the family is unknown or not a dense decoder.
        CheckpointError: a tensor is missing or has another shape.
    """
    config = checkpoint.config()
    family = find_family(config.model_type)
    architectures = getattr(config, "architectures", None) or [family.architecture]
    if family.architecture not in architectures:
        raise UnsupportedModelError(f"{checkpoint.path}: architecture {architectures} is not {family.architecture}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not checkpoint.has_head(family):
        if not config.tie_word_embeddings:
            raise CheckpointError(f"{checkpoint.path}: {family.head}.weight is missing and the embeddings are not tied")
        wanted.pop(f"{family.head}.weight")
    _compare(checkpoint, wanted)
    return config, family


def _compare(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{checkpoint.path}: {name} {list(shape)} is missing; is the download complete?")
        if info.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(info.shape)}, its config implies {list(shape)}"
            )


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise NumericalError naming the first tensor that holds a NaN or infinity."""
    from prefixquant.tasks.errors import NumericalError

    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericalError(f"{where}: {name} holds {bad} NaN or infinite values of {tensor.numel()}")
