"""Look a checkpoint over and keep the small files that every later stage needs: config and tokenizer. No weights."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.errors import CheckpointError
from prefixquant.tasks.model.checkpoint import Checkpoint, check_checkpoint, open_checkpoint
from prefixquant.tasks.model.families import ModelFamily, find_family
from prefixquant.tasks.model.whole import device_map
from prefixquant.tasks.rotate import Ends

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What is known of a model without its weights."""

    config: PretrainedConfig
    family: ModelFamily
    dtype: str
    """Type in which the checkpoint's weights are naturally kept, e.g. `float32`."""

    bos_token_id: int | None
    """Token that starts a sequence; None if tokenizer and config name none."""

    files: dict[str, bytes]
    """config.json, generation_config.json and the tokenizer's files."""
    index: dict[str, Any] | None
    """The checkpoint's, see `Checkpoint.index`."""

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return int(self.config.num_hidden_layers)

    def to_artifact(self) -> Artifact:
        """Return the artifact to store."""
        record = {"model_type": self.family.model_type, "dtype": self.dtype, "bos_token_id": self.bos_token_id}
        return Artifact(record={**record, "num_blocks": self.num_blocks, "index": self.index}, files=self.files)

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> "LoadedModel":
        """Return what `to_artifact` stored."""
        values = json.loads(artifact.files[CONFIG])
        record = artifact.record
        return cls(
            config=AutoConfig.for_model(values.pop("model_type"), **values),
            family=find_family(record["model_type"]),
            dtype=record["dtype"],
            bos_token_id=record["bos_token_id"],
            files=artifact.files,
            index=record["index"],
        )

    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in self.files.items():
                Path(folder, name).write_bytes(data)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


_opened: dict[tuple[object, ...], Checkpoint] = {}


def cached_checkpoint(path: str, index: dict[str, Any] | None = None) -> Checkpoint:
    """Return the checkpoint at a path, opened once a process; files that have changed since are opened anew."""
    source = Path(path)
    files = sorted(source.iterdir()) if source.is_dir() else [source] if source.exists() else []
    status = [(file.name, file.stat()) for file in files if file.is_file()]
    identity = (path, *((name, each.st_size, each.st_mtime_ns) for name, each in status))
    if identity not in _opened:
        checkpoint = open_checkpoint(source, index)
        _opened.clear()
        _opened[identity] = checkpoint
    return _opened[identity]


def load_model(path: str, checkpoint: Checkpoint | None = None) -> LoadedModel:
    """Return what a local folder or .gguf file holds, after checking every tensor's name and shape.

    `checkpoint`: the opened checkpoint, if `path` is not local; its own path then holds config and tokenizer.

    Raises:
        CheckpointError: it is missing, damaged or incomplete.
        UnsupportedModelError: its architecture is not known.
    """
    folder = Path(path) if checkpoint is None else checkpoint.path
    if (folder / "prefixquant.json").is_file():
        raise CheckpointError(f"{path} is a quantized model already; give the original one")
    checkpoint = checkpoint or cached_checkpoint(path)
    config, family = check_checkpoint(checkpoint)
    tokenizer = _load_tokenizer(folder)
    bos = tokenizer.bos_token_id
    if bos is None and family.eos_serves_as_bos:
        bos = config.bos_token_id if config.bos_token_id is not None else tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        files = {file.name: file.read_bytes() for file in Path(saved).iterdir() if file.is_file()}
    config.name_or_path = ""  # where it lies is no part of it
    files[CONFIG] = config.to_json_string(use_diff=False).encode()
    own = Path(path) / GENERATION_CONFIG
    files[GENERATION_CONFIG] = (
        own.read_bytes() if own.is_file() else GenerationConfig.from_model_config(config).to_json_string().encode()
    )
    dtype = str(checkpoint.default_dtype).removeprefix("torch.")
    return LoadedModel(config=config, family=family, dtype=dtype, bos_token_id=bos, files=files, index=checkpoint.index)


def _load_tokenizer(path: Path) -> Any:
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as err:
        reason = str(err).splitlines()[0]
        advice = "code of a model's folder is never run: " if "custom code" in reason else ""
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({reason}); {advice}add tokenizer.json") from err


def read_ends(checkpoint: Checkpoint, family: ModelFamily) -> Ends:
    """Return embedding, final gain and head as the checkpoint has them; a tied head is the embedding itself."""
    embedding = checkpoint.read(f"{family.embedding}.weight")
    head = checkpoint.read(f"{family.head}.weight") if checkpoint.has_head(family) else embedding
    return Ends(embedding=embedding, gain=checkpoint.read(f"{family.final_norm}.weight"), head=head)


def load_original(path: str, dtype: str, devices: Sequence[torch.device]) -> Any:
    """Return the original model as transformers loads it, whole, its blocks in equal parts on the devices.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    source = Path(path)
    # Left open, transformers asks on the terminal whether to run code that lies in the folder.
    folder, options = source, dict[str, Any](trust_remote_code=False)
    if source.suffix == ".gguf":
        folder, options = source.parent, options | {"gguf_file": source.name}
    try:
        if len(devices) > 1:
            config = AutoConfig.from_pretrained(folder, **options)
            placed = device_map(find_family(config.model_type), config.num_hidden_layers, devices)
            if config.tie_word_embeddings:
                placed[find_family(config.model_type).head] = devices[0]
            options |= {"device_map": placed}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be loaded: {str(err).splitlines()[0]}") from err
    return model.eval().requires_grad_(False) if len(devices) > 1 else model.eval().requires_grad_(False).to(devices[0])


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type of a name such as `bfloat16`."""
    return getattr(torch, name)
