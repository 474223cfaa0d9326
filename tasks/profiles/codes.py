"""Codes and scales as compressed-tensors names them (the `quantization_config` of a config.json, and its tensors).

Letters: O outputs and I inputs of a linear, H KV heads.
"""

from collections.abc import Collection, Mapping
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor
from transformers import PretrainedConfig

from prefixquant.kernels.hadamard.reference import hadamard_axes
from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.saved import SITES, unpack_weight
from prefixquant.tasks.model.sites import (
    ATTENTION_INPUT,
    DOWN_INPUT,
    KEYS,
    MLP_INPUT,
    O_INPUT,
    VALUES,
    OnlineTransforms,
    head_size,
)
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.profiles.profile import PACKED, Profile


def quantization_config(
    profile: Profile,
    quantize: QuantizeConfig,
    transforms: OnlineTransforms,
    config: PretrainedConfig,
    family: ModelFamily,
    exempt: Collection[int] = (),
) -> dict[str, Any]:
    """Return the config of a profile for weights with activations, keys and values as `quantize` says.

    `exempt`: blocks whose down_proj stays in 16 bit. No key is null: readers outside compressed-tensors compare them
    with numbers. Rotations are the online ones alone; those folded into the weights are none of a reader's business.
    """
    assert quantize.weights is not None
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "format": profile.format,
        "weights": _arguments(quantize.weights),
    }
    if quantize.activations is not None:
        group["input_activations"] = _arguments(quantize.activations)
    found = {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": profile.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [family.head, *(f"{family.block_prefix(block)}{family.down}" for block in sorted(exempt))],
    }
    if quantize.keys is not None:
        found["kv_cache_scheme"] = _arguments(quantize.keys)
    groups = _transform_groups(transforms, config, family)
    return found | ({"transform_config": {"config_groups": groups}} if groups else {})


def _arguments(spec: WeightSpec | ActivationSpec | KeyValueSpec) -> dict[str, Any]:
    arguments = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": {"head": "attn_head"}.get(spec.granularity, spec.granularity),
        "dynamic": not isinstance(spec, WeightSpec) and spec.mode == "dynamic",
    }
    return arguments | ({} if spec.group_size is None else {"group_size": spec.group_size})


def is_sylvester(order: int) -> bool:
    """Return whether our Hadamard matrix of this order is the one compressed-tensors and vLLM build."""
    return set(_factors(order)) <= {1, 2}


def _factors(order: int) -> list[int]:
    return [factor for axis in hadamard_axes(order) for factor in axis]


def _transform_groups(
    transforms: OnlineTransforms, config: PretrainedConfig, family: ModelFamily
) -> dict[str, dict[str, Any]]:
    """Return the rotations that compressed-tensors can name; `other_rotations` has the rest.

    They are computed in float64, so that every implementation rounds to the same float32.
    """
    groups: dict[str, dict[str, Any]] = {}
    common = {"type": "hadamard", "precision": "torch.float64"}
    if transforms.r3 and is_sylvester(head_size(config)):
        targets = [f"re:.*{family.attention}$"]
        apply = [{"targets": targets, "location": location} for location in ("q_attn", "k_cache")]
        groups["R3"] = {**common, "head_dim": head_size(config), "apply": apply}
    order = transforms.r4_block or config.intermediate_size
    if transforms.r4 and is_sylvester(order):
        apply = [{"targets": [f"re:.*{family.down}$"], "location": "input"}]
        groups["R4"] = {**common, "head_dim": order, "apply": apply}
    return groups


def other_rotations(transforms: OnlineTransforms, config: PretrainedConfig) -> dict[str, list[int]]:
    """Return the rotations that compressed-tensors cannot name: orders of the known matrices they are products of."""
    wanted = {
        "R3": head_size(config) if transforms.r3 else None,
        "R4": (transforms.r4_block or config.intermediate_size) if transforms.r4 else None,
    }
    return {name: _factors(order) for name, order in wanted.items() if order is not None and not is_sylvester(order)}


def block_tensors(
    stored: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    family: ModelFamily,
    block: int,
    profile: Profile,
    quantize: QuantizeConfig,
    *,
    exempt: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return a stored block's tensors under compressed-tensors' names.

    Packed: `NAME.weight_packed` int32 words, `weight_scale` [O, G], `weight_shape` int64 [2]; else `NAME.weight` int8
    [O, I] with `weight_scale`. `NAME.input_scale` [1] for each linear that reads a site, so linears that an engine
    fuses have the same; `k_scale` and `v_scale` [H, 1, 1]. An exempt down_proj is its dequantized weight in `dtype`.

    Args:
        stored: the block's shard, as `prefixquant.tasks.model.saved` writes it.
        shapes: of every block-relative weight.
        family: whose names they are.
        block: its number.
        profile: what is written.
        quantize: as the recipe had it; `profile.adapted` says what it becomes.
        exempt: leave down_proj in 16 bit.
        dtype: of an exempt weight.
    """
    spec, adapted = quantize.weights, profile.adapted(quantize)
    assert spec is not None
    assert adapted.weights is not None
    prefix = family.block_prefix(block)
    sites = f"{prefix}{SITES}."
    tensors = {
        name: tensor
        for name, tensor in stored.items()
        if not name.startswith(sites) and not name.endswith((".weight_packed", ".weight_scale"))
    }
    for role in family.linears:
        name, shape = prefix + role, shapes[f"{role}.weight"]
        weight = unpack_weight(stored, name, shape, spec)
        if exempt and role == family.down:
            tensors[f"{name}.weight"] = weight.dequantize(spec).to(dtype)
            continue
        tensors[f"{name}.weight_scale"] = stored[f"{name}.weight_scale"]
        if profile.format == PACKED:
            same = spec.bits == adapted.weights.bits
            packed = f"{name}.weight_packed"
            tensors[packed] = (
                stored[packed] if same else pack_to_int32(weight.codes.to(torch.int8), adapted.weights.bits)
            )
            tensors[f"{name}.weight_shape"] = torch.tensor(shape, dtype=torch.int64)
        else:
            tensors[f"{name}.weight"] = weight.codes.to(torch.int8)
    if adapted.activations is not None and adapted.activations.mode == "static":
        for site, roles in _readers(family).items():
            scale = static_scale(stored[f"{sites}{site}.scale"], quantize.activations, adapted.activations)
            read = [role for role in roles if not (exempt and role == family.down)]
            tensors |= {f"{prefix}{role}.input_scale": scale.reshape(1).clone() for role in read}
    if adapted.keys is not None:
        for site, letter in ((KEYS, "k"), (VALUES, "v")):
            scale = stored[f"{sites}{site}.scale"].reshape(-1, 1, 1)
            tensors[f"{prefix}{family.attention}.{letter}_scale"] = scale.clone()
    return tensors


def _readers(family: ModelFamily) -> dict[str, tuple[str, ...]]:
    return {
        ATTENTION_INPUT: family.norm1_consumers,
        O_INPUT: (family.o,),
        MLP_INPUT: family.norm2_consumers,
        DOWN_INPUT: (family.down,),
    }


def static_scale(scale: Tensor, stored: ActivationSpec | None, wanted: ActivationSpec) -> Tensor:
    """Return the scale for the wanted bits over the range that `scale` covers with the stored ones.

    Codes of b bits reach from -2^(b-1) on, so the scale shrinks by the power of two between the bits.
    """
    assert stored is not None
    return scale * 2.0 ** (stored.bits - wanted.bits)
