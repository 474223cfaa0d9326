"""The command `prefixquant compare`: runs side by side."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixquant.pipeline.cli_options import DEFAULT_STORE, JsonOption, StoreOption


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, beginnings of their names, or recipes (the last run).")
    ],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Print runs side by side: what was quantized, what it gave on texts and tasks, what it cost."""
    from prefixquant.pipeline.compare import compare_runs, comparison

    records = compare_runs(store, runs)
    if as_json:
        print(json.dumps({"runs": records}))
        return
    table = Table("", *(escape(record["run_id"]) for record in records))
    for label, values in comparison(records):
        table.add_row(escape(label), *map(escape, values))
    Console().print(table)
