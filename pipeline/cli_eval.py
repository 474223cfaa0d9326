"""The command `prefixquant eval`: perplexity and tasks of a saved model."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from prefixquant.pipeline.cli_options import JsonOption
from prefixquant.tasks.errors import ConfigError


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder (ours or any Hugging Face one), hub id or .gguf file.")],
    text: Annotated[str | None, typer.Option("--text", help="A .txt, .jsonl or .parquet file.")] = None,
    named: Annotated[str | None, typer.Option("--set", help="A named set: wikitext2, c4, python-docs, ...")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas: piqa,arc_easy.")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples in front. Default: as the task says.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many documents of each task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    shards: Annotated[int | None, typer.Option(help="Processes that share the work. Default: one a GPU.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs over which each process spreads the model.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a saved model, held in memory whole: perplexity on a text, and tasks of lm-eval."""
    if text is not None and named is not None:
        raise ConfigError("eval takes --text FILE or --set NAME, not both")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if text is None and named is None and not names:
        raise ConfigError("eval needs --text FILE, --set NAME or --tasks NAME,NAME")
    of_tasks = {"--shots": shots, "--limit": limit, "--include-path": include_path}
    for option, value in of_tasks.items():
        if value is not None and not names:
            raise ConfigError(f"eval: {option} is for tasks; name some with --tasks")
    from prefixquant.pipeline.evaluation import evaluate_model  # torch and transformers take seconds to import

    found = evaluate_model(
        model,
        text or named,
        window=window,
        max_windows=windows,
        tasks=names,
        shots=shots,
        limit=limit,
        task_folder=include_path,
        shards=shards,
        gpus=gpus,
        device=device,
    )
    if as_json:
        print(json.dumps(found))
        return
    if "ppl" in found:
        print(f"perplexity {found['ppl']:.4f} over {found['tokens']} tokens in {found['windows']} windows of {window}")
    if names:
        from prefixquant.pipeline.report import task_rows

        table = Table("task", "metric", "value", "standard error", "documents")
        for row in task_rows(found["tasks"]):
            table.add_row(*row)
        Console().print(table)
