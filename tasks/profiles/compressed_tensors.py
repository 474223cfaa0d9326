"""Codes and scales as compressed-tensors names them (the `quantization_config` of a config.json, and its tensors).

Letters: O outputs and I inputs of a linear, H KV heads.
"""

from collections.abc import Mapping
from typing import Any

import compressed_tensors
import torch
from torch import Tensor

from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.saved import SITES
from prefixquant.tasks.model.sites import ATTENTION_INPUT, DOWN_INPUT, KEYS, MLP_INPUT, O_INPUT, VALUES
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec

PACKED = "pack-quantized"


def quantization_config(quantize: QuantizeConfig) -> dict[str, Any]:
    """Return the config for weights with activations, keys and values as `quantize` says.

    No key is null: readers outside compressed-tensors compare them with numbers.
    """
    group: dict[str, Any] = {"targets": ["Linear"], "format": PACKED}
    if quantize.weights is not None:
        group["weights"] = _arguments(quantize.weights)
    if quantize.activations is not None:
        group["input_activations"] = _arguments(quantize.activations)
    config = {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    if quantize.keys is not None:
        config["kv_cache_scheme"] = _arguments(quantize.keys)
    return config


def _arguments(spec: WeightSpec | ActivationSpec | KeyValueSpec) -> dict[str, Any]:
    strategy = {"head": "attn_head"}.get(spec.granularity, spec.granularity)
    dynamic = not isinstance(spec, WeightSpec) and spec.mode == "dynamic"
    arguments = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "dynamic": dynamic,
    }
    return arguments | ({} if spec.group_size is None else {"group_size": spec.group_size})


def block_tensors(
    stored: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], family: ModelFamily, block: int
) -> dict[str, Tensor]:
    """Return a stored block's tensors under compressed-tensors' names.

    The packed words are the same; `NAME.weight_shape` int64 [2], `NAME.input_scale` [1] for each linear that reads a
    site, and `k_scale` and `v_scale` [H, 1, 1] come with them.
    """
    prefix = family.block_prefix(block)
    sites = f"{prefix}{SITES}."
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(sites)}
    for role in family.linears:
        if f"{prefix}{role}.weight_packed" in tensors:
            tensors[f"{prefix}{role}.weight_shape"] = torch.tensor(shapes[f"{role}.weight"], dtype=torch.int64)
    readers = {
        ATTENTION_INPUT: family.norm1_consumers,
        O_INPUT: (family.o,),
        MLP_INPUT: family.norm2_consumers,
        DOWN_INPUT: (family.down,),
    }
    for site, roles in readers.items():
        scale = stored.get(f"{sites}{site}.scale")
        if scale is not None:
            tensors |= {f"{prefix}{role}.input_scale": scale.reshape(1).clone() for role in roles}
    for site, name in ((KEYS, "k_scale"), (VALUES, "v_scale")):
        scale = stored.get(f"{sites}{site}.scale")
        if scale is not None:
            tensors[f"{prefix}{family.attention}.{name}"] = scale.reshape(-1, 1, 1).clone()
    return tensors
