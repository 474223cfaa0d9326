"""Puts the runtime's modules in place of a transformers model's, block by block."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from prefixquant.kernels.dispatch import has_fp8
from prefixquant.kernels.gemm import FEW_ROWS
from prefixquant.kernels.int4 import pack_int4
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.families import find_family
from prefixquant.tasks.model.modules import SiteNorm
from prefixquant.tasks.model.saved import SITES
from prefixquant.tasks.model.sites import ATTENTION_INPUT, DOWN_INPUT, KEYS, MLP_INPUT, O_INPUT, VALUES
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.runtime.modules import (
    PACKED_FEW_ROWS,
    CodedAttention,
    CodedBlock,
    CodedLinear,
    CodedMLP,
    CodedNorm,
    InputSite,
)
from prefixquant.tasks.runtime.source import Source

ATTENTION = "prefixquant-runtime"


class Builder:
    """Builds one model."""

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype, fast_prompts: bool) -> None:
        """Raises ConfigError if no kernel runs what the source is quantized to."""
        self.source, self.device, self.dtype = source, device, dtype
        self.config, self.quantize = source.config, source.quantize
        self.family = find_family(self.config.model_type)
        _check(self.quantize, self.config)
        activations = self.quantize.activations
        fp8 = activations is not None and activations.bits <= 4 and has_fp8(device)
        self.wide = fp8 and fast_prompts
        self.fp8_rows = (FEW_ROWS if self.wide else PACKED_FEW_ROWS) + 1 if fp8 else None

    def build(self) -> Any:
        """Return the model, of its family's class; its blocks want a packed cache."""
        AttentionInterface.register(ATTENTION, _no_attention)
        AttentionMaskInterface.register(ATTENTION, _no_mask)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation=ATTENTION, dtype=self.dtype)
        family, prefix = self.family, self.source.prefix()
        layers: Any = model.get_submodule(family.blocks)
        for index, layer in enumerate(layers):
            self._fill_block(layer, index, prefix)
        ends = self.source.ends()
        for name in (family.embedding, family.head):
            model.get_submodule(name).weight = nn.Parameter(self._to(ends[f"{name}.weight"]), requires_grad=False)
        gain = self._to(ends[f"{family.final_norm}.weight"])
        model.set_submodule(family.final_norm, SiteNorm(gain, self.config.rms_norm_eps, None))
        base: Any = model.base_model
        base.rotary_emb = type(base.rotary_emb)(config=self.config).to(self.device)
        return model

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _fill_block(self, layer: nn.Module, index: int, prefix: tuple[Tensor, Tensor] | None) -> None:
        family, config = self.family, self.config
        weights, own = self.source.block(index)

        def product(*roles: str) -> CodedLinear:
            biases = [own.get(f"{role}.bias") for role in roles]
            scale = torch.cat([weights[role].scale.reshape(-1) for role in roles]).float().to(self.device)
            codes = torch.cat([weights[role].codes for role in roles]).to(self.device)
            bias = self._to(torch.cat([each for each in biases if each is not None])) if biases[0] is not None else None
            wide = codes.to(torch.float8_e4m3fn) if self.wide else None
            return CodedLinear(self._packed(codes), scale, bias, self.dtype, wide)

        def norm(role: str, site: str) -> CodedNorm:
            return CodedNorm(self._to(own[f"{role}.weight"]), config.rms_norm_eps, self._site(own, site))

        gains = [own.get(f"{family.attention}.{role}.weight") for role in ("q_norm", "k_norm")]
        scales = tuple(own[f"{SITES}.{site}.scale"].reshape(-1).float().to(self.device) for site in (KEYS, VALUES))
        scales = tuple(each.expand(config.num_key_value_heads).contiguous() for each in scales)
        old: Any = layer.get_submodule(family.attention)
        attention = CodedAttention(
            index,
            product(family.q, family.k, family.v),
            product(family.o),
            self._site(own, O_INPUT),
            (scales[0], scales[1]),
            None if prefix is None else (self._to(prefix[0][index]), self._to(prefix[1][index])),
            None if gains[0] is None or gains[1] is None else (self._to(gains[0]), self._to(gains[1])),
            eps=config.rms_norm_eps,
            scaling=old.scaling,
            hadamard=self.source.transforms.r3,
        )
        mlp = CodedMLP(
            product(family.gate, family.up),
            product(family.down),
            self._site(own, DOWN_INPUT),
            self.source.transforms.r4,
            self.source.transforms.r4_block,
        )
        norms = norm(family.norm1, ATTENTION_INPUT), norm(family.norm2, MLP_INPUT)
        CodedBlock.become(layer, norms[0], attention, norms[1], mlp)

    def _packed(self, codes: Tensor) -> Tensor:
        assert self.quantize.weights is not None
        return pack_int4(codes) if self.quantize.weights.bits <= 4 else codes.to(torch.int8)

    def _site(self, own: dict[str, Tensor], site: str) -> InputSite:
        activations = self.quantize.activations
        if activations is None:
            return InputSite(None, None, None, None)
        found = [own.get(f"{SITES}.{site}.{name}") for name in ("scale", "clip_ratio")]
        scale, ratio = (None if each is None else each.float().reshape(()).to(self.device) for each in found)
        return InputSite(activations.bits, scale, ratio, self.fp8_rows)


def _check(quantize: QuantizeConfig, config: Any) -> None:
    """Raise ConfigError unless the kernels run this."""
    weights, activations = quantize.weights, quantize.activations
    problems = []
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if _window(config) else "full_attention"]
    if set(kinds) != {"full_attention"}:
        problems.append("every block must attend to all tokens, without a sliding window")
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"the MLP's hidden_act must be silu, which its kernel computes, got {config.hidden_act}")
    if weights is None or not weights.symmetric or weights.granularity != "channel":
        problems.append("weights must be quantized, symmetric, with a scale a channel")
    elif weights.bits > 4 and (weights.bits != 8 or activations is None or activations.bits != 8):
        problems.append("weights must have at most 4 bits, or 8 with 8-bit activations")
    if activations is not None and (not activations.symmetric or activations.granularity == "group"):
        problems.append("activations must be symmetric, with a scale a tensor or a token")
    if activations is not None and activations.bits not in (4, 8):
        problems.append("activations must have 4 or 8 bits")
    for name, spec in (("keys", quantize.keys), ("values", quantize.values)):
        if spec is None or spec.bits != 4 or not spec.symmetric or spec.mode != "static" or spec.before_rope:
            problems.append(f"{name} must be static symmetric 4-bit codes, after the rotary embedding")
        elif spec.granularity not in ("head", "tensor"):
            problems.append(f"{name} must have a scale a head or a tensor")
    if problems:
        raise ConfigError(
            f"the runtime has no kernel for this folder: {'; '.join(problems)}. "
            f"prefixquant.tasks.export.load_quantized runs it as a simulation"
        )


def _window(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _no_attention(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the runtime's blocks have an attention of their own")


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
