"""The command `prefixquant export`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from prefixquant.pipeline.cli_options import DEFAULT_STORE, JsonOption, StoreOption
from prefixquant.tasks.errors import ConfigError


def export(
    source: Annotated[str, typer.Argument(metavar="RUN|DIR", help="A finished run, or the folder `run --out` wrote.")],
    profile: Annotated[str, typer.Option(help="hf-exact, vllm-w4a16, vllm-w8a8-static, vllm-w4a8-static, ...")],
    out: Annotated[Path, typer.Option(help="Folder that gets the profile.")],
    store: StoreOption = DEFAULT_STORE,
    text: Annotated[
        str | None, typer.Option("--text", help="Text to plan and measure on. Default: a run's own.")
    ] = None,
    named: Annotated[
        str | None, typer.Option("--set", help="The same, a named set: wikitext2, python-docs, ...")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window of that text.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows of that text.")] = 8,
    exempt: Annotated[
        str | None,
        typer.Option(help="Blocks whose down_proj stays in 16 bit, as 3,7, or none. Default: what measurements say."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="GPU to serve on: sm80, sm89, sm90, sm100, sm120.")] = None,
    allow_downgrade: Annotated[
        bool, typer.Option("--allow-downgrade", help="Export even if the engine runs something else on that GPU.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Reload the folder, whole, with stock tools and compare logits.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a quantized model as another tool loads it, and prove that it computes the same."""
    from prefixquant.pipeline.exporting import export as export_model
    from prefixquant.tasks.profiles.export import ProfileExportConfig
    from prefixquant.tasks.profiles.losses import GPUS
    from prefixquant.tasks.profiles.profile import find_profile

    if text is not None and named is not None:
        raise ConfigError("export takes --text FILE or --set NAME, not both")
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu} is not known; use {', '.join(GPUS)}")
    config = ProfileExportConfig(exempt=_blocks(exempt), verify=verify, gpu=gpu, allow_downgrade=allow_downgrade)
    result = export_model(
        source,
        find_profile(profile),
        out,
        config,
        store_url=store,
        text=text or named,
        window=window,
        windows=windows,
        device=device,
    )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps({"out": str(out), **result.to_json()}))
        return
    table = Table("measured", "value")
    if result.exempt or result.exemptions is not None:
        table.add_row("down_proj in 16 bit, blocks", ", ".join(map(str, result.exempt)) or "none")
    if result.exemptions is not None:
        for count, ppl in result.exemptions.perplexity.items():
            table.add_row(f"perplexity with {count} of them (planning text)", f"{ppl:.2f}")
    if result.perplexity is not None:
        table.add_row(f"perplexity of the profile, {result.measured_tokens} tokens", f"{result.perplexity:.2f}")
        table.add_row("of the model as quantized, prefix as keys and values", f"{result.perplexity_prefix_kv:.2f}")
    if result.parity is not None:
        table.add_row("largest difference of a logit, reloaded", f"{result.parity.largest_difference:.3g}")
    table.add_row("size", f"{result.folder_bytes / 1e6:.1f} MB, in bfloat16 {result.bf16_bytes / 1e6:.1f} MB")
    table.add_row("writing took", f"{result.write_seconds:.1f} s")
    Console().print(table)
    print(f"{result.profile}: {out}")


def _blocks(exempt: str | None) -> tuple[int, ...] | None:
    if exempt is None or exempt == "auto":
        return None
    if exempt == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in exempt.split(",")}))
    except ValueError as err:
        raise ConfigError(f"--exempt takes block numbers such as 3,7, or none, got {exempt!r}") from err
