"""A whole quantized model from its parts, on one device or spread over several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from prefixquant.tasks.model.block import load_sites
from prefixquant.tasks.model.cache import attach_prefix
from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.modules import ATTENTION, SiteNorm, register_attention
from prefixquant.tasks.model.saved import Sites
from prefixquant.tasks.model.sites import OnlineTransforms, install_sites, sites_of
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.rotate import Ends


def device_map(family: ModelFamily, num_blocks: int, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Return module name -> device: consecutive blocks in equal parts, the ends with their neighbours."""
    rotary = f"{family.embedding.rsplit('.', 1)[0]}.rotary_emb"
    placed = {f"{family.blocks}.{block}": devices[block * len(devices) // num_blocks] for block in range(num_blocks)}
    return {
        family.embedding: devices[0],
        rotary: devices[0],
        **placed,
        family.final_norm: devices[-1],
        family.head: devices[-1],
    }


def build_model(
    config: PretrainedConfig,
    family: ModelFamily,
    blocks: Iterable[tuple[Mapping[str, Tensor], Sites]],
    ends: Ends,
    prefix: tuple[Tensor, Tensor] | None,
    *,
    quantize: QuantizeConfig,
    transforms: OnlineTransforms,
    devices: Sequence[torch.device],
) -> Any:
    """Return a fake-quantized transformers model that puts its prefix in front by itself.

    Args:
        config: of the model, embedding and head not tied.
        family: its roles.
        blocks: of each block in order its weights by block-relative name and its sites' parameters; taken one at a
            time.
        ends: embedding, final gain and head.
        prefix: keys and values [L, KV heads, P, head_dim], or None.
        quantize: what is quantized, and how.
        transforms: the online rotations.
        devices: where the blocks go, in equal consecutive parts; with several, accelerate moves what passes between.
    """
    register_attention()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=ends.embedding.dtype)
    layers = model.get_submodule(family.blocks)
    placed = device_map(family, len(layers), devices)
    for index, (layer, (weights, sites)) in enumerate(zip(layers, blocks, strict=True)):
        device = placed[f"{family.blocks}.{index}"]
        layer.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
        install_sites(layer, config, family, transforms=transforms, quantize=quantize)
        load_sites(sites_of(layer, family), sites, device)
    for name, tensor in ((family.embedding, ends.embedding), (family.head, ends.head)):
        model.get_submodule(name).weight = nn.Parameter(tensor.to(placed[name]), requires_grad=False)
    gain = ends.gain.to(placed[family.final_norm])
    model.set_submodule(family.final_norm, SiteNorm(gain, config.rms_norm_eps, None))
    base = model.get_submodule(family.embedding.rsplit(".", 1)[0])
    base.rotary_emb = type(base.rotary_emb)(config=config).to(devices[0])
    if prefix is not None:  # a block elsewhere takes its part over
        prefix = (prefix[0].to(devices[0]), prefix[1].to(devices[0]))
    attach_prefix(base, [layer.get_submodule(family.attention) for layer in layers], prefix)
    model.eval().requires_grad_(False)
    return model if len(devices) == 1 else dispatch_model(model, placed)
