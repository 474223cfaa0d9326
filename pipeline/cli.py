"""The command `prefixquant`. Results go to stdout, progress and messages to stderr.

Exit status: 0 done, 1 a task failed, 2 the input is wrong.
"""

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixquant.cluster.errors import ArtifactError
from prefixquant.cluster.jobs import JobError
from prefixquant.pipeline.cli_bench import bench
from prefixquant.pipeline.cli_compare import compare
from prefixquant.pipeline.cli_eval import evaluate
from prefixquant.pipeline.cli_export import export
from prefixquant.pipeline.cli_jobs import job_app, submit
from prefixquant.pipeline.cli_options import DEFAULT_STORE, JsonOption, Overrides, RecipeArgument, StoreOption
from prefixquant.pipeline.cli_plan import plan
from prefixquant.tasks.errors import PrefixQuantError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize causal language models to 4-bit weights, activations and KV cache with static scales.",
)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[str | None, typer.Option(help="Folder or URL that gets the loadable model.")] = None,
    tracking: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow URI, or `off`. Default: a SQLite file in the store."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use. Default: a local one.")] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores of the local cluster. Default: all.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the local cluster. Default: all.")] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Processes that train a block together. Default: as many as the GPUs allow.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build what is missing, track it in MLflow, and write the quantized model."""
    from prefixquant.pipeline.recipe import load_recipe
    from prefixquant.pipeline.run import RunOptions, run_recipe

    options = RunOptions(
        store=store,
        out=out,
        tracking=tracking,
        address=address,
        cpus=cpus,
        gpus=gpus,
        ranks=ranks,
        quiet=quiet or as_json,
    )
    loaded = load_recipe(recipe, overrides or ())
    for warning in loaded.export.warnings():
        _say(f"warning: {warning}")
    summary = run_recipe(loaded, options)
    for failure in summary.tracking_failures:
        _say(f"tracking: {failure}")
    if as_json:
        print(json.dumps(summary.to_json()))
        return
    _show_result(summary.record)
    console = Console()
    console.print(
        f"run {summary.run_id}: {summary.tasks_run} tasks run, {summary.tasks_cached} cached, {summary.seconds:.1f} s",
        soft_wrap=True,
        highlight=False,
    )
    if summary.out:
        console.print(f"model: {summary.out}", soft_wrap=True, highlight=False)
    if summary.mlflow_url:
        console.print(f"MLflow: {summary.mlflow_url}", soft_wrap=True, highlight=False)


@app.command()
def runs(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the runs that the store knows."""
    from prefixquant.pipeline.inspect import list_run_records

    records = list_run_records(store)
    if as_json:
        print(json.dumps({"runs": records}))
        return
    table = Table("run", "status", "updated", "perplexity")
    for record in records:
        ppl = ", ".join(f"{m['model']} {m['ppl']:.2f}" for m in record["ppl"])
        table.add_row(escape(record["run_id"]), record["status"], record["updated"], ppl)
    Console().print(table)


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="A run, or an artifact key or the beginning of one.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Print what the store holds of a run or an artifact, as JSON."""
    from prefixquant.pipeline.inspect import describe

    print(json.dumps(describe(store, key), indent=2))


@app.command()
def gc(
    store: StoreOption = DEFAULT_STORE,
    forget: Annotated[list[str] | None, typer.Option(help="Runs to forget first; their artifacts become free.")] = None,
    min_age: Annotated[float, typer.Option(help="Leave what is younger, in minutes.")] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what no run refers to, and only that."""
    from prefixquant.pipeline.inspect import collect

    report = collect(store, forget or [], min_age_s=60 * min_age, dry_run=dry_run)
    if as_json:
        print(json.dumps(report))
        return
    verb = "would remove" if dry_run else "removed"
    print(
        f"{verb} {report['artifacts']} artifacts and {report['leftovers']} leftovers, "
        f"{report['freed_bytes'] / 1e6:.1f} MB; kept {report['kept']} artifacts"
    )


app.command()(plan)
app.command()(bench)
app.command()(export)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command()(submit)
app.add_typer(job_app, name="job")


def _show_result(record: dict[str, Any]) -> None:
    console = Console()
    prefix = record["prefix"]
    pairs = zip(prefix["tokens"], prefix["token_ids"], strict=True)
    shown = ", ".join(f"{token!r} ({index})" for token, index in pairs) or "none"
    console.print(f"prefix: {shown}", soft_wrap=True, highlight=False, markup=False)
    if record["perplexity"]:
        table = Table("model", "text", "perplexity", "tokens")
        for each in record["perplexity"]:
            table.add_row(each["model"], escape(each["text"]), f"{each['ppl']:.2f}", str(each["tokens"]))
        console.print(table)
    if record["tasks"]:
        from prefixquant.pipeline.report import task_rows

        table = Table("model", "task", "metric", "value", "standard error", "documents")
        for each in record["tasks"]:
            for row in task_rows([each]):
                table.add_row(each["model"], *row)
        console.print(table)
    if any(each["text"] == "python-docs" for each in record["perplexity"]):
        print("python-docs is a demonstration corpus (CPython's own documentation); do not compare with other texts.")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def main() -> None:
    """Run the command line; every expected error is one message and an exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress is enough
    try:
        sys.exit(app(standalone_mode=False))  # None, or the status of a typer.Exit
    except (typer.Abort, KeyboardInterrupt):
        _say("interrupted; finished tasks are stored, and the same command goes on from them")
        sys.exit(1)
    except (PrefixQuantError, ArtifactError, JobError, ConnectionError) as err:
        from prefixquant.pipeline.outcome import exit_status

        _say(f"error: {err}")
        sys.exit(exit_status(err))
    except Exception as err:
        if hasattr(err, "format_message"):  # click's usage errors
            if message := err.format_message():  # none where the help has just been shown
                _say(f"error: {message}")
            sys.exit(2)
        raise
