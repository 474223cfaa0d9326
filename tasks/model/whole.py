"""A whole quantized model from its parts, on one device or spread over several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from prefixquant.tasks.model.block import load_sites
from prefixquant.tasks.model.cache import attach_prefix, cache_name, prefix_cache
from prefixquant.tasks.model.families import ModelFamily, find_family
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
        if ends.embedding.dtype == torch.float64:
            _norm_heads_in_float64(layer.get_submodule(family.attention), config.rms_norm_eps)
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
    if len(devices) == 1:
        return model
    from accelerate import dispatch_model  # the only need for it

    return dispatch_model(model, placed, skip_keys=model._skip_keys_device_placement, force_hooks=True)


def _norm_heads_in_float64(attention: Any, eps: float) -> None:
    """Replace an attention's norms of query and key heads, if it has them: transformers' compute in float32."""
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            setattr(attention, name, SiteNorm(getattr(attention, name).weight.data, eps, None))


def holds_prefix(model: Any) -> bool:
    """Return whether a model comes from `build_model`: it puts its prefix, if any, in front by itself."""
    return hasattr(model, "base_model") and hasattr(model.base_model, "new_prefix_cache")


@torch.no_grad()
def unquantized_logits(model: Any, ids_T: Tensor) -> Tensor:
    """Return the logits [V] behind the tokens, with the prefix left out and every activation, key and value as it is.

    `model`: from `build_model`. Its weights stay those it has.
    """
    family = find_family(model.config.model_type)
    layers = model.get_submodule(family.blocks)
    sites = [site for layer in layers for site in sites_of(layer, family).values()]
    enabled = [site.enabled for site in sites]
    attentions = [layer.get_submodule(family.attention) for layer in layers]
    base = model.base_model
    try:
        for site in sites:
            site.enabled = False
        output = base(
            ids_T[None].to(model.device), use_cache=True, **{cache_name(base): prefix_cache(attentions, None, 1)}
        )
        return model.get_submodule(family.head)(output.last_hidden_state[0, -1])
    finally:
        for site, before in zip(sites, enabled, strict=True):
            site.enabled = before
