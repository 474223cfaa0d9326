"""The profile `hf-exact`: stock transformers, compressed-tensors and PEFT compute what the simulation computes."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.export import (
    DESCRIPTION,
    ENDS_FILE,
    PREFIX_FILE,
    block_file,
    read_config,
    read_description,
    read_quantize_config,
    read_shard,
)
from prefixquant.tasks.load import CONFIG
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.checkpoint import INDEX_FILE
from prefixquant.tasks.model.families import find_family
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.profiles.compressed_tensors import block_tensors, quantization_config
from prefixquant.tasks.profiles.prefix_adapter import FOLDER, adapter_files

NAME = "hf-exact"


def check(quantize: QuantizeConfig, transforms: OnlineTransforms) -> None:
    """Raise ConfigError, naming the recipe's keys, unless the format can say all of this."""
    problems = []
    if transforms.r3 or transforms.r4:
        problems.append("online rotations are not applied by transformers; set rotate.r3=false rotate.r4=false")
    if quantize.weights is None:
        problems.append("there are no integer weights to pack; quantize.weights must not be off")
    if quantize.keys != quantize.values:
        problems.append("one scheme holds for keys and values; make quantize.keys and quantize.values equal")
    if quantize.keys is not None and (quantize.keys.before_rope or quantize.keys.mode == "dynamic"):
        problems.append("keys are quantized behind the rotary embedding and static; set quantize.keys so")
    if quantize.keys is not None and quantize.keys.granularity != "head":
        problems.append("keys and values need a scale a head; set quantize.keys.granularity=head, values likewise")
    for name, spec in (("weights", quantize.weights), ("activations", quantize.activations), ("keys", quantize.keys)):
        if spec is not None and not spec.symmetric:
            problems.append(f"zero points are not written by this profile; set quantize.{name}.symmetric=true")
    activations = quantize.activations
    if activations is not None and (activations.mode != "static" or activations.granularity != "tensor"):
        problems.append("activations need a static scale a tensor; set quantize.activations.mode=static")
    if problems:
        raise ConfigError(f"profile {NAME} cannot hold this model: {'; '.join(problems)}")


def write(folder: Path, out: Path) -> None:
    """Write the profile of an exported folder into an empty one, one block in memory at a time.

    Raises:
        ConfigError: the format cannot say what the folder holds.
        CheckpointError: a file of it is missing or damaged.
    """
    description, config = read_description(folder), read_config(folder)
    quantize, transforms = read_quantize_config(description["quantize"]), OnlineTransforms(**description["transforms"])
    check(quantize, transforms)
    family = find_family(config.model_type)
    names: dict[str, str] = {}
    for index in range(config.num_hidden_layers):
        stored = read_shard(folder / block_file(index))
        tensors = block_tensors(stored, block_shapes(config, index), family, index)
        save_file(tensors, out / block_file(index), metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, block_file(index))
    ends = read_shard(folder / ENDS_FILE)
    save_file(ends, out / ENDS_FILE, metadata={"format": "pt"})
    names |= dict.fromkeys(ends, ENDS_FILE)
    if description["prefix_token_ids"]:
        prefix = read_shard(folder / PREFIX_FILE)
        save_file(prefix, out / PREFIX_FILE, metadata={"format": "pt"})
        (out / FOLDER).mkdir()
        for name, content in adapter_files(prefix["keys"], prefix["values"], config).items():
            (out / FOLDER / name).write_bytes(content)
    for path in _others(folder):
        (out / path.name).write_bytes(path.read_bytes())
    written = json.loads((folder / CONFIG).read_text()) | {"quantization_config": quantization_config(quantize)}
    _write_json(out / CONFIG, written)
    _write_json(out / INDEX_FILE, {"metadata": {}, "weight_map": names})
    _write_json(out / DESCRIPTION, description | {"profile": NAME})


def _others(folder: Path) -> Iterator[Path]:
    """Yield the files that are taken over as they are: the tokenizer's and the generation config."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (CONFIG, INDEX_FILE, DESCRIPTION):
            yield path


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def largest_difference(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of logits."""
    return float((logits.double() - wanted.double()).abs().max())
