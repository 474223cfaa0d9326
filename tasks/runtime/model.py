"""A quantized model that computes with its codes: `QuantizedCausalLM.load(folder)`. Needs neither Ray nor MLflow."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from prefixquant.kernels.int4 import pack_int4
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.export import (
    ENDS_FILE,
    PREFIX_FILE,
    block_file,
    read_config,
    read_description,
    read_quantize_config,
    read_shard,
)
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.cache import CACHE_NAMES, cache_name
from prefixquant.tasks.model.families import ModelFamily, find_family
from prefixquant.tasks.model.modules import SiteNorm
from prefixquant.tasks.model.quantizer import QuantizedWeight
from prefixquant.tasks.model.saved import SITES, saved_weights
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
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.runtime.cache import PackedCache
from prefixquant.tasks.runtime.modules import CodedAttention, CodedLinear, CodedMLP, CodedNorm, InputSite

ATTENTION = "prefixquant-runtime"


class QuantizedCausalLM:
    """A transformers causal language model on integer codes, 4-bit KV cache and prefix included.

    An instance is also one of its family's class, so `forward` and `generate` are transformers' own. Each call without
    a cache starts behind the prefix. Batches are padded on the left, with an attention mask.
    """

    config: Any
    num_prefix_tokens: int

    @staticmethod
    def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
        """Return the model in a folder that `prefixquant run --out` wrote.

        On a GPU with Triton the kernels of `prefixquant.kernels` run, elsewhere their PyTorch references.

        Args:
            folder: the export.
            device: where it runs.
            dtype: of embedding, head, norms and what flows between the blocks.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: the folder is quantized in a way that no kernel runs.
        """
        return _Loader(Path(folder), torch.device(device), dtype).load()

    def new_cache(self, batch: int, places: int = 0) -> PackedCache:
        """Return an empty cache for `batch` sequences, with room for `places` tokens; it grows."""
        config: Any = self.config
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        blocks, heads = config.num_hidden_layers, config.num_key_value_heads
        cache = PackedCache(batch, blocks, heads, head_size(config), device)
        cache.reserve(places)
        return cache

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, into a packed cache. Beams are refused: the cache cannot be reordered."""
        if (kwargs.get("num_beams") or 1) > 1:
            raise ConfigError("generate: num_beams needs a cache that can be reordered; use 1 or sampling")
        name = cache_name(self.base_model)  # type: ignore[attr-defined]
        if kwargs.get(name) is None:
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            tokens = next(each for each in given if each is not None)
            kwargs[name] = self.new_cache(len(tokens) * (kwargs.get("num_return_sequences") or 1))
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]


class _Loader:
    """Builds one model."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        description = read_description(folder)
        self.folder, self.device, self.dtype = folder, device, dtype
        self.config = read_config(folder)
        self.family: ModelFamily = find_family(self.config.model_type)
        self.quantize: QuantizeConfig = read_quantize_config(description["quantize"])
        self.transforms = OnlineTransforms(**description["transforms"])
        self.prefix_token_ids = description["prefix_token_ids"]
        _check(self.quantize, self.config)
        activations = self.quantize.activations
        fp8 = activations is not None and activations.bits <= 4 and _has_fp8(device)
        self.layout = "fp8" if fp8 else "int8"

    def load(self) -> Any:
        AttentionInterface.register(ATTENTION, _no_attention)
        AttentionMaskInterface.register(ATTENTION, _no_mask)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation=ATTENTION, dtype=self.dtype)
        family = self.family
        prefix = read_shard(self.folder / PREFIX_FILE) if self.prefix_token_ids else None
        layers: Any = model.get_submodule(family.blocks)
        for index, layer in enumerate(layers):
            self._fill_block(layer, index, None if prefix is None else (prefix["keys"], prefix["values"]))
        ends = read_shard(self.folder / ENDS_FILE)
        for name in (family.embedding, family.head):
            model.get_submodule(name).weight = nn.Parameter(self._to(ends[f"{name}.weight"]), requires_grad=False)
        gain = self._to(ends[f"{family.final_norm}.weight"])
        model.set_submodule(family.final_norm, SiteNorm(gain, self.config.rms_norm_eps, None))
        base: Any = model.get_submodule(family.embedding.rsplit(".", 1)[0])
        base.rotary_emb = type(base.rotary_emb)(config=self.config).to(self.device)
        model.__class__ = type(f"Quantized{type(model).__name__}", (QuantizedCausalLM, type(model)), {})
        model.num_prefix_tokens = len(self.prefix_token_ids)
        _attach_cache(model, base)
        return model.eval().requires_grad_(False)

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _fill_block(self, layer: nn.Module, index: int, prefix: tuple[Tensor, Tensor] | None) -> None:
        family, config, path = self.family, self.config, self.folder / block_file(index)
        stored = read_shard(path)
        shapes = block_shapes(config, 0)
        assert self.quantize.weights is not None
        weights = saved_weights(stored, shapes, family, index, self.quantize.weights)
        own = {name.removeprefix(family.block_prefix(index)): tensor for name, tensor in stored.items()}

        def product(*roles: str) -> CodedLinear:
            biases = [own.get(f"{role}.bias") for role in roles]
            scale = torch.cat([weights[role].scale.reshape(-1) for role in roles]).float()
            codes = torch.cat([self._codes(weights[role]) for role in roles])
            bias = self._to(torch.cat([each for each in biases if each is not None])) if biases[0] is not None else None
            return CodedLinear(codes.to(self.device), scale.to(self.device), bias, self.dtype)

        def norm(role: str, site: str) -> CodedNorm:
            return CodedNorm(self._to(own[f"{role}.weight"]), config.rms_norm_eps, self._site(own, site))

        def head_norm(role: str) -> SiteNorm | None:
            weight = own.get(f"{family.attention}.{role}.weight")
            return None if weight is None else SiteNorm(self._to(weight), config.rms_norm_eps, None)

        scales = tuple(own[f"{SITES}.{site}.scale"].reshape(-1).float().to(self.device) for site in (KEYS, VALUES))
        scales = tuple(each.expand(config.num_key_value_heads).contiguous() for each in scales)
        attention: Any = layer.get_submodule(family.attention)
        new = CodedAttention(
            index,
            product(family.q, family.k, family.v),
            product(family.o),
            self._site(own, O_INPUT),
            (scales[0], scales[1]),
            None if prefix is None else (self._to(prefix[0][index]), self._to(prefix[1][index])),
            (head_norm("q_norm"), head_norm("k_norm")),
            channels=head_size(config),
            scaling=attention.scaling,
            hadamard=self.transforms.r3,
        )
        mlp = CodedMLP(
            product(family.gate, family.up),
            product(family.down),
            self._site(own, DOWN_INPUT),
            self.transforms.r4,
            self.transforms.r4_block,
        )
        layer.set_submodule(family.attention, new)
        layer.set_submodule(family.gate.rsplit(".", 1)[0], mlp)
        layer.set_submodule(family.norm1, norm(family.norm1, ATTENTION_INPUT))
        layer.set_submodule(family.norm2, norm(family.norm2, MLP_INPUT))

    def _codes(self, weight: QuantizedWeight) -> Tensor:
        assert self.quantize.weights is not None
        return pack_int4(weight.codes) if self.quantize.weights.bits <= 4 else weight.codes.to(torch.int8)

    def _site(self, own: dict[str, Tensor], site: str) -> InputSite:
        activations = self.quantize.activations
        if activations is None:
            return InputSite(None, None, None, self.layout)
        found = [own.get(f"{SITES}.{site}.{name}") for name in ("scale", "clip_ratio")]
        scale, ratio = (None if each is None else each.float().reshape(()).to(self.device) for each in found)
        return InputSite(activations.bits, scale, ratio, self.layout)


def _check(quantize: QuantizeConfig, config: Any) -> None:
    """Raise ConfigError unless the kernels run this."""
    weights, activations = quantize.weights, quantize.activations
    problems = []
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if _window(config) else "full_attention"]
    if set(kinds) != {"full_attention"}:
        problems.append("every block must attend to all tokens, without a sliding window")
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


def _attach_cache(model: Any, base: nn.Module) -> None:
    """Have every forward run over a packed cache, its positions behind the prefix."""

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        batch, count = tokens.shape[:2]
        cache = next((kwargs[each] for each in CACHE_NAMES if kwargs.get(each) is not None), None)
        if cache is None:
            cache = model.new_cache(batch)
        if not isinstance(cache, PackedCache) or cache.batch != batch:
            raise ConfigError(f"this model's KV cache is packed; pass model.new_cache({batch}), or none")
        mask = kwargs.pop("attention_mask", None)
        if mask is not None and cache.filled == 0 and count > 1:
            cache.start = _padding(mask)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(cache.filled, cache.filled + count, device=tokens.device).unsqueeze(0)
        kwargs["position_ids"] = positions + model.num_prefix_tokens
        cache.begin(count)
        return args, kwargs | {cache_name(base): cache, "packed_cache": cache, "use_cache": True}

    def after(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        kwargs["packed_cache"].end((kwargs["inputs_embeds"] if tokens is None else tokens).shape[1])

    base.register_forward_pre_hook(before, with_kwargs=True)
    base.register_forward_hook(after, with_kwargs=True)


def _padding(mask: Tensor) -> Tensor | None:
    """Return the first place of each sequence that is no padding, or None if none is padded on the left."""
    if mask.dim() != 2:
        raise ConfigError(f"attention_mask must be [batch, tokens], 0 where padded, got {tuple(mask.shape)}")
    starts = mask.ne(0).int().argmax(dim=1).to(torch.int32)
    return starts if bool(starts.any()) else None


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _no_attention(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the runtime's blocks have an attention of their own")


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
