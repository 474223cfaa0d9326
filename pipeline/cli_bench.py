"""`prefixquant bench`: the runtime's speed beside bf16 transformers, and how faithful it is."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from prefixquant.pipeline.cli_options import JsonOption
from prefixquant.tasks.errors import ConfigError


def bench(
    model: Annotated[
        str, typer.Argument(help="Folder that `run --out` wrote, or llama-2-7b, llama-3-8b, llama-3-70b, smollm2-135m.")
    ],
    blocks: Annotated[int | None, typer.Option(help="Blocks of a model with random weights. Default: all.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences decoded together; may be repeated.")] = None,
    baseline: Annotated[bool, typer.Option(help="Measure bf16 transformers as well.")] = True,
    compiled: Annotated[bool, typer.Option(help="Measure it compiled too, which takes minutes.")] = True,
    dynamic: Annotated[bool, typer.Option(help="Measure a scale a token beside static scales.")] = True,
    text: Annotated[
        str | None,
        typer.Option(help="Compare a folder's logits with its simulation on this text, and measure no time."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of 2048 tokens of the text.")] = 20,
    exact_windows: Annotated[
        int, typer.Option(min=0, help="Of these, the first ones compared in float64 too, 8 bytes a weight. 0: none.")
    ] = 4,
    as_json: JsonOption = False,
) -> None:
    """Measure prompts, decoding and memory on a GPU, after checking every operator against its reference."""
    if text is not None:
        _faithful(model, text, windows, exact_windows, as_json)
        return
    from prefixquant.tasks.runtime.bench import BenchConfig
    from prefixquant.tasks.runtime.bench import bench as measure

    config = BenchConfig(
        prompt=prompt,
        batches=tuple(batch or (1, 64)),
        blocks=blocks,
        baseline=baseline,
        compiled=compiled,
        dynamic=dynamic,
    )
    report = measure(model, config, say=lambda line: print(line, file=sys.stderr if as_json else None, flush=True))
    if as_json:
        print(json.dumps(report.figures))


def _faithful(model: str, text: str, windows: int, exact_windows: int, as_json: bool) -> None:
    import torch
    from transformers import AutoTokenizer

    from prefixquant.tasks.export import is_exported
    from prefixquant.tasks.runtime.faithful import Exactness, Faithfulness, compare_exactly, compare_with_simulation
    from prefixquant.tasks.texts import TextConfig, cut_windows, read_documents, tokenize

    folder = Path(model)
    if not is_exported(folder):
        raise ConfigError(f"bench --text compares a folder that `prefixquant run --out` wrote; {model} is none")
    tokens = tokenize(AutoTokenizer.from_pretrained(folder), read_documents(TextConfig(source=text)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cut = cut_windows(tokens, 2048, windows, where="--windows")
    found: dict[str, dict[str, float]] = {}

    def show(name: str, result: Exactness | Faithfulness) -> None:
        found[name] = result.to_json()
        print(f"{name}: {result}", file=sys.stderr if as_json else None, flush=True)

    for name in ("float32", "bfloat16"):
        show(name, compare_with_simulation(folder, cut, device=device, dtype=getattr(torch, name)))
    if exact_windows:
        show("float64", compare_exactly(folder, cut[:exact_windows], device=device))
    if as_json:
        print(json.dumps(found))
