"""Measure a saved model: ours or any that transformers loads."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefixquant.pipeline.recipe import ModelConfig
from prefixquant.pipeline.remote_model import local_model
from prefixquant.pipeline.source import resolve_source
from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.evaluate import PerplexityConfig, model_perplexity
from prefixquant.tasks.export import is_exported, load_quantized
from prefixquant.tasks.texts import TextConfig, cut_windows, read_documents, tokenize


def evaluate_model(
    model: str, text: str, *, window: int = 2048, max_windows: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Return {ppl, tokens, windows} of a folder, hub id or .gguf file over a named set or a text file.

    Raises:
        ConfigError, CheckpointError, DataError: an argument, the model or the text is wrong.
    """
    config = PerplexityConfig(window=window, max_windows=max_windows)
    documents = read_documents(TextConfig(source=text, split="evaluation"))
    place = resolve_source(ModelConfig(source=model))
    path = local_model(place) if isinstance(place, str) else place
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA GPU is available to torch here; use --device cpu")
    try:
        torch.empty(0, device=chosen)
    except RuntimeError as err:
        raise ConfigError(f"--device {chosen}: {str(err).splitlines()[0]}; use cpu or cuda") from err
    loaded, tokenizer = _load(path, chosen)
    windows = cut_windows(tokenize(tokenizer, documents), config.window, config.max_windows)
    return asdict(model_perplexity(loaded, windows))


def _load(path: Path, device: str) -> tuple[Any, Any]:
    # Left open, transformers asks on the terminal whether to run code that lies in the folder.
    folder, options = path, dict[str, Any](trust_remote_code=False)
    if path.suffix == ".gguf":
        folder, options = path.parent, options | {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if is_exported(path):
            return load_quantized(path, device=device), tokenizer
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be loaded: {str(err).splitlines()[0]}") from err
    return model.eval().to(device), tokenizer
