"""What transformers leaves out when it loads this folder: the KV cache's codes, and rotations done at run time.

Needs torch, transformers, safetensors and compressed-tensors alone. Either of

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model = complete(AutoModelForCausalLM.from_pretrained(FOLDER), FOLDER)

Transformers before 5.24 applies the KV cache's quantization itself; from 5.24 on compressed-tensors (0.20) does not
recognize its attention modules, and the scales are dropped with no more than a line on unexpected keys.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.modeling import (
    IMPL_ATTR,
    QuantizedAttentionImpl,
    initialize_hooked_attention,
    initialize_hooked_kv_cache,
    register_key_hook,
    register_query_hook,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.transform.utils.hadamard import REPO_PATH
from safetensors import safe_open
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class ExactCausalLM:
    """Stands in for the model's own class, and gives back an instance of that."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Return the model in a local folder, complete; arguments are those of transformers."""
        config = config or transformers.AutoConfig.from_pretrained(folder)
        own = getattr(transformers, config.architectures[0])
        for name in ("trust_remote_code", "code_revision", "adapter_kwargs"):
            kwargs.pop(name, None)
        return complete(own.from_pretrained(folder, *args, config=config, **kwargs), folder)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Do nothing: the class is not saved again."""


def complete(model: Any, folder: str | Path) -> Any:
    """Add to a model just loaded from `folder` what transformers left out, in place, and return it."""
    folder = Path(folder)
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    attentions = {name: module for name, module in model.named_modules() if name.endswith(".self_attn")}
    if "kv_cache_scheme" in written:
        _quantize_cache(model, attentions, folder, QuantizationArgs(**written["kv_cache_scheme"]))
    for attention in attentions.values():
        if not hasattr(attention, IMPL_ATTR):
            attention.register_module(IMPL_ATTR, AttentionOfPlainQueries(model.config))
    if "transform_config" in written:
        apply_transform_config(model, TransformConfig(**written["transform_config"]))
    others = json.loads((folder / "prefixquant.json").read_text())["export"]["other_rotations"]
    if "R3" in others:
        for attention in attentions.values():
            initialize_hooked_attention(model, attention)
            register_query_hook(attention, lambda _, x: rotate(x, others["R3"]))
            register_key_hook(attention, lambda _, x: rotate(x, others["R3"]))
    if "R4" in others:
        for name, module in model.named_modules():
            if name.endswith(".down_proj"):
                module.register_forward_pre_hook(lambda _, args: (rotate(args[0], others["R4"]),), prepend=True)
    for attention in attentions.values():
        if hasattr(attention, "kv_cache") and not _knows_old_name(attention):
            attention.register_forward_pre_hook(_pass_cache_on, with_kwargs=True)
    return model


class AttentionOfPlainQueries(QuantizedAttentionImpl):
    """Attention whose queries can be rotated; compressed-tensors' own would quantize them by the keys' scheme."""

    def forward(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own attention implementation returns."""
        own = ALL_ATTENTION_FUNCTIONS[QuantizedAttentionImpl._original_impl]
        return own(module, query, key, value, *args, **kwargs)


def _knows_old_name(attention: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(attention.forward).parameters


def _pass_cache_on(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the attention module the quantizing cache, which compressed-tensors passes under a name of the past."""
    cache = kwargs.pop("past_key_value")
    cache.add_past_key_values(kwargs.get("cache"))
    return args, {**kwargs, "cache": cache}


def _quantize_cache(model: Any, attentions: Mapping[str, Any], folder: Path, arguments: QuantizationArgs) -> None:
    """Do what compressed-tensors does for the attention modules it recognizes, and read their scales."""
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, attention in attentions.items():
        if getattr(attention, "quantization_scheme", None) is not None:
            continue
        attention.quantization_scheme = QuantizationScheme(targets=["attention"], input_activations=arguments)
        attention.quantization_status = QuantizationStatus.FROZEN
        initialize_hooked_kv_cache(model, attention)
        some = next(attention.parameters())
        for scale in ("k_scale", "v_scale"):
            with safe_open(folder / shards[f"{name}.{scale}"], framework="pt") as file:
                stored = file.get_tensor(f"{name}.{scale}").to(device=some.device, dtype=_float_type(some, model))
            attention.register_parameter(scale, nn.Parameter(stored, requires_grad=False))


def _float_type(parameter: Tensor, model: Any) -> torch.dtype:
    return parameter.dtype if parameter.is_floating_point() else model.dtype


_known: dict[int, Tensor] = {}


def rotate(x: Tensor, orders: Sequence[int]) -> Tensor:
    """Return x @ (H_1 (x) H_2 (x) ...) over the last axis, for orthonormal Hadamard matrices of known orders.

    Computed in float64 and rounded once. A last axis longer than the product is rotated in blocks.
    """
    y = x.double().unflatten(-1, (-1, *orders))
    for axis, order in enumerate(orders, start=x.ndim):
        if order not in _known:
            with safe_open(REPO_PATH, framework="pt") as file:
                _known[order] = file.get_tensor(str(order)).double() / order**0.5
        y = torch.tensordot(y, _known[order].to(y.device), dims=([axis], [0])).movedim(-1, axis)
    return y.reshape(x.shape).to(x.dtype)
