"""Write a profile's folder from an exported one, a block at a time."""

import json
import shutil
from collections.abc import Collection, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

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
from prefixquant.tasks.model.families import ModelFamily, find_family
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.profiles.codes import block_tensors, other_rotations, quantization_config
from prefixquant.tasks.profiles.prefix import ADAPTER, TOKENIZER, adapter_files, put_prefix_first
from prefixquant.tasks.profiles.profile import Profile, check_profile

LOADER = "exact_loader.py"
AUTO_CLASS = "exact_loader.ExactCausalLM"


class ExportedModel:
    """What an exported folder says of itself."""

    def __init__(self, folder: Path) -> None:
        """Read the small files. Raises CheckpointError if the folder is none of ours, or a profile's."""
        self.folder = folder
        self.description: dict[str, Any] = read_description(folder)
        if "export" in self.description:
            raise ConfigError(
                f"{folder} is the export profile {self.description['export']['profile']}; "
                f"give a run, or the folder that `prefixquant run --out` wrote"
            )
        self.config: PretrainedConfig = read_config(folder)
        self.family: ModelFamily = find_family(self.config.model_type)
        self.quantize: QuantizeConfig = read_quantize_config(self.description["quantize"])
        self.transforms = OnlineTransforms(**self.description["transforms"])
        self.prefix_token_ids: list[int] = self.description["prefix_token_ids"]
        self.dtype: torch.dtype = getattr(torch, self.description["dtype"])

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return int(self.config.num_hidden_layers)

    def check(self, profile: Profile) -> None:
        """Raise ConfigError unless the profile can hold this model."""
        check_profile(profile, self.quantize, self.transforms)
        if profile.engine == "vllm" and self.transforms.r4 and getattr(self.config, "mlp_bias", False):
            raise ConfigError(
                f"export profile {profile.name}: vLLM rotates no linear with a bias, which down_proj has here; "
                f"set rotate.r4=false"
            )


def needs_loader(profile: Profile, model: ExportedModel) -> bool:
    """Return whether transformers needs a call of ours to compute what the folder says."""
    transforms = profile.transforms(model.transforms)
    return profile.adapted(model.quantize).keys is not None or transforms.r3 or transforms.r4


def write_profile(model: ExportedModel, profile: Profile, out: Path, *, exempt: Collection[int] = ()) -> dict[str, Any]:
    """Write the profile of an exported folder into an empty one and return what its `prefixquant.json` says of it.

    One block is in memory at a time. `exempt`: blocks whose down_proj stays in 16 bit.

    Raises:
        ConfigError: the profile cannot hold what the folder does.
        CheckpointError: a file of it is missing or damaged.
    """
    model.check(profile)
    folder, config, family = model.folder, model.config, model.family
    quantize, transforms = profile.adapted(model.quantize), profile.transforms(model.transforms)
    shards: dict[str, str] = {}
    for block in range(model.num_blocks):
        tensors = block_tensors(
            read_shard(folder / block_file(block)),
            block_shapes(config, block),
            family,
            block,
            profile,
            model.quantize,
            exempt=block in exempt,
            dtype=model.dtype,
        )
        save_file(tensors, out / block_file(block), metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors, block_file(block))
    ends = read_shard(folder / ENDS_FILE)
    save_file(ends, out / ENDS_FILE, metadata={"format": "pt"})
    shards |= dict.fromkeys(ends, ENDS_FILE)
    for path in _others(folder):
        (out / path.name).write_bytes(path.read_bytes())
    written = json.loads((folder / CONFIG).read_text()) | {
        "quantization_config": quantization_config(profile, quantize, transforms, config, family, exempt)
    }
    loader = needs_loader(profile, model)
    if loader:
        source = resources.files("prefixquant.tasks.profiles") / LOADER
        (out / LOADER).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        if profile.engine == "transformers":
            written["auto_map"] = {"AutoModelForCausalLM": AUTO_CLASS}
    write_json(out / CONFIG, written)
    write_json(out / INDEX_FILE, {"metadata": {}, "weight_map": shards})
    described = {
        "profile": profile.name,
        "exempt_down_proj": sorted(exempt),
        "other_rotations": other_rotations(transforms, config),
        "loader": LOADER if loader else None,
        "prefix_in_chats": _write_prefix(model, profile, out),
    }
    write_json(out / DESCRIPTION, model.description | {"export": described})
    return described


def _write_prefix(model: ExportedModel, profile: Profile, out: Path) -> bool:
    """Write the carriers of the prefix; return whether a chat template carries it."""
    if not model.prefix_token_ids:
        return False
    if profile.prefix == "tokens":
        return put_prefix_first(out, model.prefix_token_ids)
    stored = read_shard(model.folder / PREFIX_FILE)
    save_file(stored, out / PREFIX_FILE, metadata={"format": "pt"})
    (out / ADAPTER).mkdir()
    for name, content in adapter_files(stored["keys"], stored["values"], model.config).items():
        (out / ADAPTER / name).write_bytes(content)
    (out / TOKENIZER).mkdir()
    for path in _others(model.folder):
        if path.name != "generation_config.json":
            shutil.copyfile(path, out / TOKENIZER / path.name)
    return put_prefix_first(out / TOKENIZER, model.prefix_token_ids)


def _others(folder: Path) -> Iterator[Path]:
    """Yield the files that are taken over as they are: the tokenizer's and the generation config."""
    ours = (CONFIG, INDEX_FILE, DESCRIPTION, "README.md")
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ours:
            yield path


def write_json(path: Path, value: object) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
