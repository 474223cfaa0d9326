"""One decoder block, run through transformers' own model class with a single layer.

Letters: N sequences, B batch, P prefix tokens, T tokens, D hidden.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, PretrainedConfig

from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.model.cache import cache_name, prefix_cache
from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.modules import ATTENTION, KeySiteBeforeRope, Site, register_attention
from prefixquant.tasks.model.sites import (
    ATTENTION_INPUT,
    DOWN_INPUT,
    MLP_INPUT,
    O_INPUT,
    OnlineTransforms,
    install_sites,
    sites_of,
)
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.ways import StepWays

Prefix = tuple[Tensor, Tensor]
"""Keys and values of the prefix in one block, each [KV heads, P, head_dim], as they lie in the cache."""


def block_prefix(prefix: tuple[Tensor, Tensor] | None, block: int, device: torch.device) -> Prefix | None:
    """Return one block's part of the prefix [L, KV heads, P, head_dim], on the device."""
    return None if prefix is None else (prefix[0][block].to(device), prefix[1][block].to(device))


def single_block_config(config: PretrainedConfig, block: int) -> PretrainedConfig:
    """Return the config of a model that consists of this block alone (its attention kind is kept)."""
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        single.layer_types = [config.layer_types[block]]
    return single


def block_shapes(config: PretrainedConfig, block: int) -> dict[str, torch.Size]:
    """Return the shape of every weight of a block, by block-relative name."""
    with torch.device("meta"):
        model = AutoModel.from_config(single_block_config(config, block))
    return {name: tensor.shape for name, tensor in model.layers[0].state_dict().items()}


def load_sites(sites: Mapping[str, Site], parameters: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
    """Fix the grids of sites to stored `scale` and `zero_point`, or `clip_ratio`, in place and on a device."""
    for name, site in sites.items():
        if site.quantizer is not None:
            stored = {key: tensor.to(device) for key, tensor in parameters[name].items()}
            site.quantizer.load_state_dict(stored, assign=True)


class Block(nn.Module):
    """A decoder block with quantization sites, taking hidden states to hidden states behind the prefix."""

    def __init__(
        self,
        config: PretrainedConfig,
        family: ModelFamily,
        block: int,
        weights: Mapping[str, Tensor],
        *,
        transforms: OnlineTransforms,
        quantize: QuantizeConfig | None,
        device: torch.device,
    ) -> None:
        """Build from the block's weights by block-relative name; `quantize` None builds no quantizer."""
        super().__init__()
        register_attention()
        self.index = block
        single = single_block_config(config, block)
        with torch.device("meta"):
            model = AutoModel.from_config(single, attn_implementation=ATTENTION)
        layer = model.layers[0]
        dtype = weights[f"{family.q}.weight"].dtype
        placed = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
        layer.load_state_dict(placed, assign=True)
        install_sites(layer, single, family, transforms=transforms, quantize=quantize)
        model.embed_tokens = nn.Identity()
        model.norm = nn.Identity()
        model.rotary_emb = type(model.rotary_emb)(config=single)
        self.model = model.to(device).eval().requires_grad_(False)
        self.layer = layer
        self.family = family
        self._cache_name = cache_name(self.model)
        self.take_ways(StepWays())

    def take_ways(self, ways: StepWays) -> None:
        """Compute training steps in these ways from now on."""
        family, attention = self.family, cast(Any, self.attention)
        attention.pads_queries = ways.attention == "padded"
        sources = {family.q: ATTENTION_INPUT, family.k: ATTENTION_INPUT, family.v: ATTENTION_INPUT}
        sources |= {family.o: O_INPUT, family.gate: MLP_INPUT, family.up: MLP_INPUT, family.down: DOWN_INPUT}
        sites = self.sites
        for role, site in sources.items():
            self.linear(role).code_site = (sites[site],) if ways.code_products else None

    @property
    def attention(self) -> nn.Module:
        """The attention module, which owns the key and value sites."""
        return self.layer.get_submodule(self.family.attention)

    @property
    def sites(self) -> dict[str, Site]:
        """The block's sites by name."""
        return sites_of(self.layer, self.family)

    def linear(self, role: str) -> Any:
        """Return one of the seven linears by its block-relative name."""
        module: Any = self.layer.get_submodule(role)
        return module.inner if isinstance(module, KeySiteBeforeRope) else module

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Within the context, quantize at the named sites alone."""
        before = {name: site.enabled for name, site in self.sites.items()}
        try:
            for name, site in self.sites.items():
                site.enabled = name in names
            yield
        finally:
            for name, site in self.sites.items():
                site.enabled = before[name]

    @contextmanager
    def weights_on_grid(self) -> Iterator[None]:
        """Within the context, the forward uses weights that were quantized once, on entering it.

        Outside of what torch.compile sees, so that the gradient of a weight stays as the product made it.
        """
        linears = [each for role in self.family.linears if (each := self.linear(role)).shard is None]
        try:
            for each in linears:
                if each.multiplies_codes:
                    each.weight_on_grid, each.codes_on_grid = each.weight_quantizer.with_codes(each.weight)
                elif each.weight_quantizer is not None:
                    each.weight_on_grid = each.weight_quantizer(each.weight)
            yield
        finally:
            for each in linears:
                each.weight_on_grid = each.codes_on_grid = None

    def forward(self, hidden_BTD: Tensor, prefix: Prefix | None) -> Tensor:
        """Return the block's output [B, T, D]; real tokens take the positions after the prefix.

        Differentiable in what has been made trainable; by default nothing requires a gradient.
        """
        stacked = None if prefix is None else (prefix[0].unsqueeze(0), prefix[1].unsqueeze(0))
        cache = prefix_cache([self.attention], stacked, hidden_BTD.shape[0])
        return self._run(hidden_BTD, cache).last_hidden_state

    def _run(self, hidden_BTD: Tensor, cache: Cache) -> Any:
        return self.model(inputs_embeds=hidden_BTD, use_cache=True, **{self._cache_name: cache})

    @torch.no_grad()
    def prefix_states(self, hidden_1PD: Tensor) -> tuple[Tensor, Prefix]:
        """Return the block's output for the prefix tokens and their keys and values, in full precision."""
        with self.only():
            cache = prefix_cache([self.attention], None, 1)
            output = self._run(hidden_1PD, cache).last_hidden_state
        return output, (cache.layers[0].keys[0], cache.layers[0].values[0])


def run_batched(
    function: Callable[[Tensor], Tensor], stream_NTD: Tensor, batch_size: int, device: torch.device, where: str
) -> Tensor:
    """Return function(batch) over a stream of N sequences, on the stream's device.

    Raises:
        NumericalError: an output is NaN or infinite.
    """
    outputs = torch.empty_like(stream_NTD)
    for start in range(0, len(stream_NTD), batch_size):
        output = function(stream_NTD[start : start + batch_size].to(device))
        if not torch.isfinite(output).all():
            raise NumericalError(f"{where}: the output holds NaN or infinite values (sequences {start} and on)")
        outputs[start : start + batch_size] = output.to(outputs.device)
    return outputs
