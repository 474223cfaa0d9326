"""Measure what settings of one model reach: perplexity, seconds and GPU memory, in this process, without Ray.

    python -m prefixquant.pipeline.bench_quality w4a4 w4a4-128x5 "w4a4-128x5 train.lookahead=1" \\
        --model model.gguf --calibration calib.jsonl --text dev.jsonl --store store

A setting is one of those named below, or the name of a shipped recipe, perhaps followed by key=value of its own. Each
gets a line as soon as it is measured, read from the manifests of its artifacts; the last line is all of them as JSON.
What settings have in common is computed once, and with --store also what an earlier call has computed.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prefixquant.cluster.inline_session import InlineSession
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_record
from prefixquant.pipeline.build import UNTRAINED, build_graph
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.loading import look_over, prepare
from prefixquant.pipeline.machines import machine_of
from prefixquant.pipeline.materialize import check_output, materialize
from prefixquant.pipeline.outcome import exit_status
from prefixquant.pipeline.recipe import Recipe, load_recipe
from prefixquant.pipeline.runner import execute
from prefixquant.tasks.errors import ConfigError, PrefixQuantError

SETTINGS = {
    "w4a4": "w4a4kv4-static",
    "w4a4-gptq": "w4a4kv4-static-gptq",
    "w4a4-dynamic": "w4a4kv4-dynamic",
    "w4a4-128x5": "w4a4kv4-static-trained train.sequences=128 train.epochs=5",
    "w4a4-128x5-segments": "w4a4kv4-static-trained train.sequences=128 train.epochs=5 train.segments=4",
    "w4a4-128x5-polish": "w4a4kv4-static-trained train.sequences=128 train.epochs=5 train.segments=4 train.polish=true",
    "w4a4-512x5": "w4a4kv4-static-trained",
    "w4a4-512x20": "w4a4kv4-static-trained train.epochs=20",
    "w4a4-dynamic-128x5": "w4a4kv4-dynamic-trained train.sequences=128 train.epochs=5",
    "w4a8": "w4a8kv4-static",
    "w4a8-128x10": "w4a8kv4-static-trained train.sequences=128",
    "w4a8-512x10": "w4a8kv4-static-trained",
}
"""Name -> recipe and what is changed in it. 128x5: 128 sequences, 5 epochs."""

PREPARING = ("rotate", "prefix", "calibrate", "stream", "block")
TRAINING = ("train", "polish")
SECONDS_BETWEEN_LINES = 2.0
COLUMNS = "ppl  untrained  full precision  prefix  preparing s  GB  training s  GB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one setting reached and cost. Work shared with another setting counts for both."""

    setting: str
    ppl: float
    ppl_untrained: float | None
    """Before training; None without training."""

    ppl_full_precision: float
    windows: int
    prefix_token_ids: list[int]
    preparing_seconds: float
    """Of rotation, prefix, calibration, streams and search, from reading the inputs to before publishing."""

    preparing_gb: float
    """Most GPU memory that tensors took meanwhile."""

    training_seconds: float
    """Of the last attempt at training, the streams and all reading and rounding included."""

    epoch_seconds: float
    """Of the epochs alone, over all attempts."""

    training_gb: float
    seconds: dict[str, float]
    """By task; of a training run by node."""

    device: str

    def line(self) -> str:
        """Return it as one line for people, the figures in the order of `COLUMNS`."""
        untrained = "-" if self.ppl_untrained is None else f"{self.ppl_untrained:.2f}"
        return (
            f"{self.setting}: {self.ppl:.2f}  {untrained}  {self.ppl_full_precision:.2f}  "
            f"{','.join(map(str, self.prefix_token_ids)) or 'none'}  "
            f"{self.preparing_seconds:.1f}  {self.preparing_gb:.2f}  "
            f"{self.training_seconds:.1f}  {self.training_gb:.2f}"
        )


def recipe_of(setting: str, overrides: Sequence[str], everywhere: Sequence[str]) -> Recipe:
    """Return the recipe of a setting; of `everywhere`, those of `train` and `gptq` count where it has that group.

    Raises:
        ConfigError: there is no such recipe, or an override is wrong.
    """
    name, *own = setting.split()
    name, *named = SETTINGS.get(name, name).split()
    own = [*overrides, *named, *own]
    plain = load_recipe(name, own)
    absent = tuple(f"{group}." for group in ("train", "gptq") if getattr(plain, group) is None)
    return load_recipe(name, [*own, *(each for each in everywhere if not each.startswith(absent))])


class _Progress:
    """Says on standard error what is under way, at most every other second."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Show the task that has ended or, while blocks are trained, the epoch; nothing if there is no text."""
        now = time.monotonic()
        if text and now - self._last >= SECONDS_BETWEEN_LINES:
            print(f"[{now - self._start:.0f} s] {text}", file=sys.stderr, flush=True)
            self._last = now


class Bench:
    """Measures settings, one after the other. What a store holds is not computed again."""

    def __init__(self, store: ArtifactStore, device: str) -> None:
        self.store, self._progress = store, _Progress()
        self._session = InlineSession(
            device=device,
            cpus=torch.get_num_threads(),
            listener=lambda message: self._progress.say(message.get("text", "")),
        )

    def measure(self, setting: str, recipe: Recipe) -> tuple[Measured, Graph, int]:
        """Run what a setting needs and return its figures, its graph and the number of blocks."""
        source = prepare(recipe)
        model, _ = look_over(source, self.store, lambda: self._session)
        graph = build_graph(recipe, source, model, machine=machine_of(self._session.gpu()))
        evaluated = [name for name in graph.nodes if name.startswith("evaluate[")]
        streams = [name for name, node in graph.nodes.items() if node.task.ephemeral]  # the next settings want them too
        wanted = ["export", *graph.parents("export"), *evaluated, *streams]
        execute(
            graph, wanted, self.store, self._session, on_event=lambda event: self._progress.say(event.node)
        ).require()
        return _read(setting, graph, self.store), graph, model.num_blocks


def _read(setting: str, graph: Graph, store: ArtifactStore) -> Measured:
    metas = {name: store.manifest(graph.key(name)).meta for name in graph.nodes if store.has(graph.key(name))}
    tasks = {name: graph.nodes[name].task.name for name in metas}
    seconds: dict[str, float] = {}
    for name, meta in metas.items():
        label = name if tasks[name] in TRAINING else tasks[name]
        seconds[label] = seconds.get(label, 0.0) + meta.get("seconds", 0.0)
    trained = [load_record(store, graph.key(name)) for name, task in tasks.items() if task in ("trained", "polished")]
    epochs = [epoch for record in trained for epoch in record["epochs"]]
    ppl: dict[str, dict[str, Any]] = {
        name.replace(name[name.index(",") : name.index("]")], ""): load_record(store, graph.key(name))
        for name in metas
        if tasks[name] == "evaluate"
    }
    measured = ppl["evaluate[quantized]"]
    untrained = ppl.get(f"evaluate[quantized]{UNTRAINED}")

    def peak(names: Iterable[str], *others: int) -> float:
        return max([*(metas[name]["peak_device_bytes"] for name in names), *others], default=0) / 1e9

    return Measured(
        setting=setting,
        ppl=measured["ppl"],
        ppl_untrained=None if untrained is None else untrained["ppl"],
        ppl_full_precision=ppl["evaluate[full_precision]"]["ppl"],
        windows=measured["windows"],
        prefix_token_ids=load_record(store, graph.key("prefix"))["token_ids"],
        preparing_seconds=sum(seconds.get(task, 0.0) for task in PREPARING),
        preparing_gb=peak(name for name, task in tasks.items() if task in PREPARING),
        training_seconds=sum(metas[name]["seconds"] for name, task in tasks.items() if task in TRAINING),
        epoch_seconds=sum(epoch["seconds"] for epoch in epochs),
        training_gb=peak(
            (name for name, task in tasks.items() if task in TRAINING),
            *(epoch["peak_device_bytes"] for epoch in epochs),
        ),
        seconds=seconds,
        device=metas["calibrate"]["device"],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the settings that are asked for and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings:\n" + "\n".join(f"  {name:20} {recipe}" for name, recipe in SETTINGS.items()),
    )
    parser.add_argument("settings", nargs="+", metavar="SETTING")
    parser.add_argument("--model", required=True, help="local Hugging Face folder, hub id or .gguf file")
    parser.add_argument("--calibration", required=True, help="named set, or a .txt, .jsonl or .parquet file")
    parser.add_argument("--text", required=True, help="likewise; perplexity is measured on it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change all settings' recipes")
    parser.add_argument("--store", type=Path, help="folder of the artifacts, kept; default: a temporary one")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the last setting's model to a folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    inputs = [
        f"model.source={json.dumps(args.model)}",
        f"data.calibration={json.dumps(args.calibration)}",
        f"evaluate.texts={json.dumps([args.text])}",
    ]
    try:
        recipes = {setting: recipe_of(setting, inputs, args.set) for setting in args.settings}
        _check_used(args.set, recipes.values())
        if args.export is not None:
            check_output(args.export)
        with ExitStack() as stack:
            folder = args.store or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefixquant-")))
            bench = Bench(ArtifactStore(os.fspath(folder.absolute())), _device(args.device))
            _measure_all(recipes, bench, args.export)
    except PrefixQuantError as err:
        print(f"{parser.prog}: {err}", file=sys.stderr)
        return exit_status(err)
    finally:
        gc.unfreeze()  # what a worker may keep until its process is killed; this one ends in order
    return 0


def _device(name: str) -> str:
    """Return a device with its index."""
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as err:  # torch without CUDA asserts
        reason = str(err).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used ({reason}); give cpu, or cuda where there is one") from err


def _measure_all(recipes: dict[str, Recipe], bench: Bench, export: Path | None) -> None:
    print(f"setting: {COLUMNS}", flush=True)
    found = []
    for setting, recipe in recipes.items():
        measured, graph, num_blocks = bench.measure(setting, recipe)
        found.append(asdict(measured))
        print(measured.line(), flush=True)
    if export is not None:
        materialize(graph, bench.store, export, num_blocks)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"settings": found, "export": None if export is None else str(export), **versions}), flush=True)


def _check_used(everywhere: Sequence[str], recipes: Iterable[Recipe]) -> None:
    for group in ("train", "gptq"):
        for each in everywhere:
            if each.startswith(f"{group}.") and all(getattr(recipe, group) is None for recipe in recipes):
                raise ConfigError(f"--set {each}: no setting has the group {group}; leave it out or add such a setting")


if __name__ == "__main__":
    sys.exit(main())
