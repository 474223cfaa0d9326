"""Arguments and options that several commands take."""

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to replace.")]
StoreOption = Annotated[
    str, typer.Option("--store", envvar="PREFIXQUANT_STORE", help="Folder or URL of the artifact store.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
DEFAULT_STORE = "prefixquant-store"
