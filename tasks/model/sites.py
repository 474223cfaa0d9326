"""The quantization sites of a block: their names, where they sit, and how they are put there."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from prefixquant.tasks.model.families import ModelFamily
from prefixquant.tasks.model.modules import KeySiteBeforeRope, Site, SiteLinear, SiteNorm
from prefixquant.tasks.model.quantizer import SiteQuantizer
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig

ATTENTION_INPUT, KEYS, VALUES, O_INPUT, MLP_INPUT, DOWN_INPUT = (
    "attention_input",
    "keys",
    "values",
    "o_input",
    "mlp_input",
    "down_input",
)
ALL_SITES = (ATTENTION_INPUT, KEYS, VALUES, O_INPUT, MLP_INPUT, DOWN_INPUT)
"""In the order data flows through them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineTransforms:
    """Hadamard transforms done at run time."""

    r3: bool
    """On queries and keys after the rotary embedding."""

    r4: bool
    """On down_proj's input."""

    r4_block: int | None = None
    """Channels of down_proj's input that are transformed together; None: all."""


def install_sites(
    layer: nn.Module,
    config: PretrainedConfig,
    family: ModelFamily,
    *,
    transforms: OnlineTransforms,
    quantize: QuantizeConfig | None,
) -> None:
    """Replace a block's norms and linears by those with sites, in place."""
    quantize = quantize or QuantizeConfig(weights=None, activations=None, keys=None, values=None)

    def activation_site(channels: int) -> Site:
        return Site(_quantizer(quantize.activations, channels))

    for norm in (family.norm1, family.norm2):
        old: Any = layer.get_submodule(norm)
        new = SiteNorm(old.weight.data, config.rms_norm_eps, activation_site(config.hidden_size))
        layer.set_submodule(norm, new)
    for name in family.linears:
        old = layer.get_submodule(name)
        site = activation_site(old.in_features) if name in (family.o, family.down) else None
        bias = None if old.bias is None else old.bias.data
        hadamard = transforms.r4 and name == family.down
        linear = SiteLinear(old.weight.data, bias, site=site, hadamard=hadamard, hadamard_block=transforms.r4_block)
        layer.set_submodule(name, linear)

    attention: Any = layer.get_submodule(family.attention)
    heads, head_dim = config.num_key_value_heads, head_size(config)
    attention.rotate_queries = transforms.r3
    attention.value_site = Site(_quantizer(quantize.values, head_dim, heads))
    if quantize.keys is not None and quantize.keys.before_rope:
        site = Site(_quantizer(quantize.keys, head_dim, heads))
        source = family.key_norm or family.k
        layer.set_submodule(source, KeySiteBeforeRope(layer.get_submodule(source), site, head_dim))
        attention.key_site = Site(None)
    else:
        attention.key_site = Site(_quantizer(quantize.keys, head_dim, heads))


def _quantizer(
    spec: ActivationSpec | KeyValueSpec | None, channels: int, heads: int | None = None
) -> SiteQuantizer | None:
    return None if spec is None else SiteQuantizer(spec, channels, heads)


def sites_of(layer: nn.Module, family: ModelFamily) -> dict[str, Site]:
    """Return a block's sites by name, in the order data flows through them."""
    attention: Any = layer.get_submodule(family.attention)
    source = layer.get_submodule(family.key_norm or family.k)
    norm1, norm2, o, down = (_any(layer, name) for name in (family.norm1, family.norm2, family.o, family.down))
    return {
        ATTENTION_INPUT: norm1.site,
        KEYS: source.site if isinstance(source, KeySiteBeforeRope) else attention.key_site,
        VALUES: attention.value_site,
        O_INPUT: o.site,
        MLP_INPUT: norm2.site,
        DOWN_INPUT: down.site,
    }


def _any(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(name)


def head_size(config: PretrainedConfig) -> int:
    """Return the channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
