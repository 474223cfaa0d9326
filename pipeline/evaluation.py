"""Measure a saved model: ours or any that transformers loads. No store and no Ray: processes of this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from prefixquant.pipeline.recipe import ModelConfig
from prefixquant.pipeline.remote_model import local_model
from prefixquant.pipeline.source import resolve_source
from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.evaluate import PerplexityConfig, merge_perplexity, model_nlls, share_of
from prefixquant.tasks.export import load_quantized, read_description
from prefixquant.tasks.harness import Answer, HarnessConfig, Request, answer, build_requests, check_task_names, score
from prefixquant.tasks.load import load_original
from prefixquant.tasks.processes import run_shards
from prefixquant.tasks.profiles.exact_loader import complete
from prefixquant.tasks.profiles.folder import LOADER
from prefixquant.tasks.profiles.prefix import ADAPTER
from prefixquant.tasks.texts import TextConfig, cut_windows, read_documents, tokenize


def evaluate_model(
    model: str,
    text: str | None = None,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    tasks: Sequence[str] = (),
    shots: int | None = None,
    limit: int | None = None,
    task_folder: Path | None = None,
    shards: int | None = None,
    gpus: int = 1,
    device: str | None = None,
) -> dict[str, Any]:
    """Return {ppl, tokens, windows} over a named set or a text file, and `tasks`, of a folder, hub id or .gguf file.

    Args:
        model: folder, hub id or .gguf file.
        text: named set or file; None measures no perplexity.
        window: tokens of a window.
        max_windows: use only the first so many windows.
        tasks: names of lm-eval's tasks; see `harness.score` for what is returned.
        shots, limit, task_folder: of the tasks.
        shards: processes that share the work. None: as many as there are GPUs for, one without.
        gpus: over which each process spreads the model.
        device: cpu or cuda. None: cuda if there is one.
    Raises:
        ConfigError, CheckpointError, DataError: an argument, the model, the text or a task is wrong.
    """
    config = PerplexityConfig(window=window, max_windows=max_windows)
    harnesses = {name: HarnessConfig(name=name, shots=shots, limit=limit) for name in tasks}
    folder = None if task_folder is None else task_folder.absolute()
    chosen = _device(device, gpus)
    if shards is not None and shards < 1:
        raise ConfigError(f"--shards must be at least 1, got {shards}")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--include-path {folder} is no folder; give one with lm-eval's YAML files")
    check_task_names(tasks, folder)
    documents = None if text is None else read_documents(TextConfig(source=text, split="evaluation"))
    place = resolve_source(ModelConfig(source=model))
    path = local_model(place) if isinstance(place, str) else place
    tokenizer = _tokenizer(path)
    windows = None
    if documents is not None:
        windows = cut_windows(tokenize(tokenizer, documents), config.window, config.max_windows)
    requests = {name: build_requests(harness, folder) for name, harness in harnesses.items()}
    count = shards or (max(1, torch.cuda.device_count() // gpus) if chosen == "cuda" else 1)
    shares = run_shards(measure_share, path, windows, requests, shards=count, gpus=gpus, device=chosen)
    found: dict[str, Any] = {}
    if windows is not None:
        found = asdict(merge_perplexity([nll_N for nll_N, _ in shares if nll_N is not None], config.window))
    if tasks:
        found["tasks"] = [
            record
            for name, harness in harnesses.items()
            for record in score(harness, requests[name], _merged(name, shares), folder)
        ]
    return found


Share = tuple[Tensor | None, dict[str, dict[int, Answer]]]
"""The windows' negative log-likelihoods, and the answers by task and request index."""


def measure_share(
    shard: int,
    shards: int,
    devices: Sequence[torch.device],
    path: Path,
    windows_NT: Tensor | None,
    requests: Mapping[str, Sequence[Request]],
) -> Share:
    """Return what one process measures."""
    loaded, token_ids = load_any(path, devices)
    nll_N = None if windows_NT is None else model_nlls(loaded, share_of(windows_NT, shard, shards))
    if not requests:
        return nll_N, {}
    from prefixquant.tasks.harness_model import PrefixModel  # takes seconds to import

    served = PrefixModel(loaded, _tokenizer(path), token_ids)
    return nll_N, {name: answer(served, asked, shard, shards) for name, asked in requests.items()}


def _merged(name: str, shares: Sequence[Share]) -> dict[int, Answer]:
    return {index: each for _, answers in shares for index, each in answers[name].items()}


def load_any(path: Path, devices: Sequence[torch.device]) -> tuple[Any, list[int]]:
    """Return the model in a folder or .gguf file, and the token ids of the prefix that it puts in front by itself.

    Ours is simulated. Any other is what transformers makes of it, with the prefix adapter that lies beside it.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    description = read_description(path) if (path / "prefixquant.json").is_file() else None
    token_ids = [] if description is None else list(description["prefix_token_ids"])
    if description is not None and "export" not in description:
        return load_quantized(path, device=devices), token_ids
    model = load_original(str(path), "auto", devices)
    if (path / LOADER).is_file():  # online rotations, or a cache that quantizes: what transformers leaves out
        model = complete(model, path)
    if not (path / ADAPTER).is_dir():
        return model, []
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(path / ADAPTER)).eval(), token_ids


def _device(device: str | None, gpus: int) -> str:
    """Return the device to use after checking that it is there."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA GPU is available to torch here; use --device cpu")
    try:
        torch.empty(0, device=chosen)
    except RuntimeError as err:
        raise ConfigError(f"--device {chosen}: {str(err).splitlines()[0]}; use cpu or cuda") from err
    there = torch.cuda.device_count() if chosen == "cuda" else 1
    if not 1 <= gpus <= there:
        raise ConfigError(f"--gpus {gpus}: there are {there} to spread over with --device {chosen}")
    return chosen


def _tokenizer(path: Path) -> Any:
    # Left open, transformers asks on the terminal whether to run code that lies in the folder.
    folder, options = path, dict[str, Any](trust_remote_code=False)
    if path.suffix == ".gguf":
        folder, options = path.parent, options | {"gguf_file": path.name}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded: {str(err).splitlines()[0]}") from err
