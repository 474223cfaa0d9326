"""A quantized model that computes with its codes: `QuantizedCausalLM.load(folder)`. Needs neither Ray nor MLflow."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixquant.kernels.dispatch import overlapped_launches
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.cache import CACHE_NAMES, cache_name
from prefixquant.tasks.model.sites import head_size
from prefixquant.tasks.runtime.cache import PackedCache
from prefixquant.tasks.runtime.graphs import Call, DecodeGraph, PromptGraphs
from prefixquant.tasks.runtime.source import FolderSource, Source


class QuantizedCausalLM:
    """A transformers causal language model on integer codes, 4-bit KV cache and prefix included.

    An instance is also one of its family's class, so `forward` and `generate` are transformers' own. Each call without
    a cache starts behind the prefix. Batches are padded on the left, with an attention mask.
    """

    config: Any
    num_prefix_tokens: int
    prompt_graphs: PromptGraphs
    recording = True
    """Set to False to have every forward run module by module, where hooks see it."""

    overlapping = True
    """Set to False to have kernels of one step or few tokens wait for each other's end (`kernels.overlap`). A recorded
    forward stays as it is."""

    @staticmethod
    def load(
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        fast_prompts: bool = False,
    ) -> Any:
        """Return the model in a folder that `prefixquant run --out` wrote.

        On a GPU with Triton the kernels of `prefixquant.kernels` run, elsewhere their PyTorch references.

        Args:
            folder: the export.
            device: where it runs.
            dtype: of embedding, head, norms and what flows between the blocks.
            fast_prompts: keep the weights' codes as fp8 as well, a byte each, for 4-bit activations on a GPU that has
                fp8. Prompts then need not unpack them; the weights of the blocks take three times the memory.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: the folder is quantized in a way that no kernel runs.
        """
        return QuantizedCausalLM.build(FolderSource(Path(folder)), torch.device(device), dtype, fast_prompts)

    @staticmethod
    def build(source: Source, device: torch.device, dtype: torch.dtype, fast_prompts: bool = False) -> Any:
        """Return the model that a source describes; see `load`."""
        from prefixquant.tasks.runtime.build import Builder

        model = Builder(source, device, dtype, fast_prompts).build()
        model.__class__ = type(f"Quantized{type(model).__name__}", (QuantizedCausalLM, type(model)), {})
        model.num_prefix_tokens, model.prompt_graphs = len(source.prefix_token_ids), PromptGraphs()
        # These change the rotary frequencies with the longest sequence seen, on the host, where no graph looks.
        model.recording = not re.search("dynamic|longrope", getattr(model.base_model.rotary_emb, "rope_type", ""))
        _attach_cache(model, model.base_model)
        return model.eval().requires_grad_(False)

    def new_cache(self, batch: int, places: int = 0) -> PackedCache:
        """Return an empty cache for `batch` sequences, with room for `places` tokens; it grows."""
        config: Any = self.config
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        blocks, heads = config.num_hidden_layers, config.num_key_value_heads
        cache = PackedCache(batch, blocks, heads, head_size(config), device)
        cache.reserve(places)
        return cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the family's forward returns. On a GPU, one more token a sequence and prompts of a length seen
        before are CUDA graphs replayed; the logits of one more token are overwritten by the next."""
        if torch.compiler.is_compiling():  # which traces the family's forward; it neither records nor overlaps
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with overlapped_launches(self.overlapping):
            call = Call(args, kwargs) if self.recording else None
            if call is not None and (step := DecodeGraph.of(self, call)) is not None:
                return step.run(call)
            if call is not None and (prompt := self.prompt_graphs.of(self, call)) is not None:
                return prompt.run(self, call)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

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
        if cache.padded_behind:
            raise ConfigError(_RIGHT_PADDING)
        if mask is not None and cache.filled == 0 and count > 1:
            cache.start, cache.padded_behind = _padding(mask)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(cache.filled, cache.filled + count, device=tokens.device).unsqueeze(0)
            if cache.start is not None:  # padding takes no positions: how far the prefix is would depend on it
                positions = positions - cache.start.unsqueeze(1)
        kwargs["position_ids"] = positions + model.num_prefix_tokens
        cache.begin(count)
        return args, kwargs | {cache_name(base): cache, "packed_cache": cache, "use_cache": True}

    def after(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        kwargs["packed_cache"].end((kwargs["inputs_embeds"] if tokens is None else tokens).shape[1])

    base.register_forward_pre_hook(before, with_kwargs=True)
    base.register_forward_hook(after, with_kwargs=True)


_RIGHT_PADDING = (
    "nothing can follow a batch whose attention_mask is 0 behind a token: the packed cache holds padding as tokens; "
    "pad on the left (tokenizer.padding_side = 'left')"
)


def _padding(mask: Tensor) -> tuple[Tensor | None, bool]:
    """Return the first place of each sequence that is no padding, None if none is padded on the left; and whether there
    is padding behind a token, which the tokens before it do not see."""
    if mask.dim() != 2:
        raise ConfigError(f"attention_mask must be [batch, tokens], 0 where padded, got {tuple(mask.shape)}")
    real = mask.ne(0).int()
    starts, behind = real.argmax(dim=1).to(torch.int32), (real.diff(dim=1) < 0).any()
    left, right = torch.stack([starts.any(), behind]).tolist()
    return starts if left else None, right
