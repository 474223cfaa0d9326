"""The folder a user loads: what is in it besides the stored blocks, and how a model is built from it again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from prefixquant.tasks.errors import CheckpointError
from prefixquant.tasks.load import CONFIG, LoadedModel
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.checkpoint import INDEX_FILE, read_safetensors_header
from prefixquant.tasks.model.families import find_family
from prefixquant.tasks.model.generation import PrefixGeneration
from prefixquant.tasks.model.saved import Sites, block_weights
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.model.whole import build_model
from prefixquant.tasks.rotate import Ends

DESCRIPTION = "prefixquant.json"
PREFIX_FILE = "prefix.safetensors"
ENDS_FILE = "model-ends.safetensors"
FORMAT = 1
"""Version of the folder's layout; raise it when a folder can no longer be read by older code."""


def block_file(block: int) -> str:
    """Return the name of a block's shard."""
    return f"model-block-{block:05d}.safetensors"


def export_files(
    model: LoadedModel,
    quantize: QuantizeConfig,
    transforms: OnlineTransforms,
    dtype: str,
    prefix_token_ids: tuple[int, ...],
    shards: Mapping[str, tuple[str, ...]],
) -> dict[str, bytes]:
    """Return the small files of the folder: config, tokenizer, `prefixquant.json` and the safetensors index.

    `shards`: shard file -> names of the tensors in it.
    """
    config = json.loads(model.files[CONFIG])
    config.update(tie_word_embeddings=False, dtype=dtype, architectures=[model.family.architecture])
    description = {
        "format": FORMAT,
        "dtype": dtype,
        "quantize": asdict(quantize),
        "transforms": asdict(transforms),
        "prefix_token_ids": list(prefix_token_ids),
    }
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    return {
        **model.files,
        CONFIG: _json(config),
        DESCRIPTION: _json(description),
        INDEX_FILE: _json(index),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def is_exported(folder: Path) -> bool:
    """Return whether a folder is one of ours."""
    return (folder / DESCRIPTION).is_file()


def load_quantized(
    folder: str | Path,
    *,
    device: str | torch.device | Sequence[torch.device] = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Return the quantized model in an exported folder as a transformers model, fake-quantized, prefix attached.

    `model(input_ids)` and `model.generate(input_ids)` put the prefix in front by themselves. To pass a cache of your
    own take one from `prefix_cache_for(model, batch_size)`. Several devices share the blocks, see `build_model`.

    `dtype`: of weights and of what flows between them; None: the folder's. In float64 everything is computed in it,
    but for the rotary embedding's cos and sin and the scales of tokens, which are float32.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    devices = [torch.device(device)] if isinstance(device, str | torch.device) else list(device)
    description = read_description(folder)
    config = read_config(folder)
    family = find_family(config.model_type)
    quantize = read_quantize_config(description["quantize"])
    dtype = getattr(torch, description["dtype"]) if dtype is None else dtype
    shapes = block_shapes(config, 0)

    def blocks() -> Iterator[tuple[dict[str, Tensor], Sites]]:
        for index in range(config.num_hidden_layers):
            path = folder / block_file(index)
            try:
                yield block_weights(read_shard(path), shapes, family, index, quantize.weights, dtype)
            except KeyError as err:
                raise CheckpointError(f"{path} holds no tensor {err}; run the recipe again") from err

    stored = read_shard(folder / ENDS_FILE)
    prefix = read_shard(folder / PREFIX_FILE) if description["prefix_token_ids"] else None
    model = build_model(
        config,
        family,
        blocks(),
        Ends(*(stored[f"{name}.weight"].to(dtype) for name in (family.embedding, family.final_norm, family.head))),
        None if prefix is None else (prefix["keys"].to(dtype), prefix["values"].to(dtype)),
        quantize=quantize,
        transforms=OnlineTransforms(**description["transforms"]),
        devices=devices,
    )
    PrefixGeneration.become(model, description["prefix_token_ids"])
    return model


def read_description(folder: Path) -> dict[str, Any]:
    """Return what `prefixquant.json` of an exported folder says."""
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{folder}: {DESCRIPTION} cannot be read ({err}); run the recipe again") from err
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: {DESCRIPTION} has format {description.get('format')}, this version reads {FORMAT}; "
            f"run the recipe again"
        )
    return description


def read_config(folder: Path) -> PretrainedConfig:
    """Return the transformers config of an exported folder."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as err:
        reason = str(err).splitlines()[0]
        raise CheckpointError(f"{folder}: {CONFIG} cannot be read ({reason}); run the recipe again") from err


def read_quantize_config(values: Mapping[str, Any]) -> QuantizeConfig:
    """Return the `quantize` group of a folder's description."""
    kinds = {"weights": WeightSpec, "activations": ActivationSpec, "keys": KeyValueSpec, "values": KeyValueSpec}
    return QuantizeConfig(
        **{name: None if values[name] is None else kind(**values[name]) for name, kind in kinds.items()}
    )


def read_shard(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file of an exported folder, on the CPU."""
    names = read_safetensors_header(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}
