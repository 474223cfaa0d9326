"""Rehearse a run on a model of any shape with random weights: `python -m prefixquant.pipeline.rehearse`.

A few blocks of a large model cost what they cost in the whole one, so a rehearsal tells memory, seconds and bytes of
every stage before the model is there. It goes through the same graph, tasks and store as a run; without Ray (not
installed, or `--inline`) in this process, task after task. What a task took is told as soon as it has ended, and of
training what an epoch took, so that a rehearsal that is cut short has its figures all the same.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prefixquant.cluster.inline_session import InlineSession
from prefixquant.cluster.ray_session import connect
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.build import Source, build_graph, targets
from prefixquant.pipeline.check import Measured, StageCheck, compare, fit, table
from prefixquant.pipeline.graph import Estimate, Graph
from prefixquant.pipeline.loading import look_over
from prefixquant.pipeline.machines import Machine, machine_of
from prefixquant.pipeline.outcome import Event, RunResult
from prefixquant.pipeline.recipe import load_recipe
from prefixquant.pipeline.runner import Session, execute
from prefixquant.pipeline.shape import Shape
from prefixquant.pipeline.source import source_fingerprint
from prefixquant.pipeline.worker import peak_host_bytes
from prefixquant.tasks.errors import ConfigError, PrefixQuantError
from prefixquant.tasks.random_checkpoint import MIN_VOCABULARY, SHAPES, write_random_checkpoint

RECIPE = "llama-3-70b-w4a4kv4-trained"

Record = Mapping[str, Any]
"""What a rehearsal tells of the checkpoint, a task or an epoch: seconds, bytes, and beside them what was predicted."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a rehearsal found."""

    graph: Graph
    result: RunResult
    device: str
    checkpoint_seconds: float
    """Of making the random checkpoint."""
    checkpoint_bytes: int
    checks: list[StageCheck]
    """What the stages took, and what was predicted for this machine."""
    fitted: Machine
    """The machine with the rates that were found."""


def rehearse(
    shape: str,
    blocks: int,
    folder: Path,
    *,
    recipe: str = RECIPE,
    overrides: Sequence[str] = (),
    vocabulary: int = MIN_VOCABULARY,
    inline: bool = False,
    until: str | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Rehearsal:
    """Make the checkpoint in `folder`, run the recipe on it and return what it cost.

    Args:
        shape: one of `SHAPES`.
        blocks: of the model.
        folder: gets the model and the store.
        recipe: name or file. Its model and texts are replaced, and nothing is evaluated unless an override says so.
        overrides: `key=value` of the recipe.
        vocabulary: tokens of the model.
        inline: do without Ray.
        until: the stage with which it ends; only what that is made of runs. None: the whole recipe.
        on_record: called with what is known of the checkpoint, a task or an epoch, at once.

    Raises:
        PrefixQuantError: recipe, shape or vocabulary are wrong, no task is of the stage, or a signal ended it before
            there was a graph. Later ones end with what has been found.
    """
    began = time.monotonic()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    start = time.monotonic()
    path = folder / "model"
    size = write_random_checkpoint(
        path, SHAPES[shape], blocks=blocks, vocabulary=vocabulary, dtype=dtype, device=device
    )
    made = time.monotonic() - start
    on_record({"stage": "checkpoint", "seconds": made, "written_bytes": size, "host_bytes": peak_host_bytes()})
    if gpu:
        torch.cuda.empty_cache()
    own = [f"model.source={path}", "data.calibration=python-docs", "evaluate.texts=[]"]
    checked = replace(load_recipe(recipe, [*own, *overrides]), name="rehearsal")
    store = ArtifactStore(str(folder / "store"))
    source = Source(path=path, fingerprint=source_fingerprint(path))
    names: dict[str, str] = {}

    def listen(message: Mapping[str, Any]) -> None:
        said = {"text": f"published {message['product']}"} if "product" in message else _said(message)
        on_record(
            {"node": names[message["key"]], "at": time.monotonic() - began, "host_bytes": peak_host_bytes()} | said
        )

    def tell(event: Event) -> None:
        record = _record(event, graph.nodes[event.node].estimate)
        if record is not None:
            on_record({"node": event.node, "stage": event.task, "at": time.monotonic() - began} | record)

    with _session(inline, listen) as session:
        model, _ = look_over(source, store, lambda: session)
        machine = machine_of(session.gpu())
        graph = build_graph(checked, source, model, machine=machine)
        names |= {graph.key(each): each for each in graph.order}
        result = execute(graph, _targets(graph, until), store, session, on_event=tell)
    name = torch.cuda.get_device_name(device) if gpu else "cpu"
    sizes = Shape.of(model, model.dtype if checked.model.dtype == "auto" else checked.model.dtype, checked)
    took = {node: Measured.of(each) for node, each in result.results.items()}
    checks, fitted = compare(graph, took, sizes, machine), fit(graph, took, sizes, machine)
    return Rehearsal(graph, result, name, made, size, checks, fitted)


def _targets(graph: Graph, until: str | None) -> tuple[str, ...]:
    """Return the nodes a rehearsal is for: those of the stage. Raises ConfigError if there are none."""
    if until is None:
        return targets(graph)
    found = tuple(name for name in graph.order if graph.nodes[name].task.name == until)
    if not found:
        stages = dict.fromkeys(graph.nodes[name].task.name for name in graph.order)
        raise ConfigError(f"--until {until}: the recipe has no such stage; it has {', '.join(stages)}")
    return found


def _record(event: Event, predicted: Estimate | None) -> dict[str, Any] | None:
    """Return what an event tells beside node and time; None if nothing."""
    if event.kind in ("failed", "repaired", "reduced"):
        return {event.kind: event.message}
    if event.kind == "progress":
        return _said({"text": event.message, "metrics": event.metrics})
    if event.kind != "done" or event.result is None:
        return None
    took = asdict(Measured.of(event.result))
    if predicted is None:
        return took
    names = ("seconds", "host_bytes", "device_bytes")
    return took | {f"predicted_{name}": getattr(predicted, name) for name in names}


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": message["text"], **message["metrics"]}


@contextmanager
def _session(inline: bool, listener: Callable[[dict[str, Any]], None]) -> Iterator[Session]:
    """Give where tasks run. `listener` hears tasks in this process; those on Ray are heard through events."""
    if inline or find_spec("ray") is None:
        with InlineSession(device="cuda:0" if torch.cuda.is_available() else "cpu", listener=listener) as here:
            yield here
    else:
        with connect() as cluster:
            yield cluster


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, rehearse and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to replace")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-70b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=MIN_VOCABULARY, help="tokens; Llama 3 has 128256")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--folder", type=Path, help="keep model and store here; default: a temporary folder")
    parser.add_argument("--inline", action="store_true", help="without Ray, in this process")
    parser.add_argument("--fit", action="store_true", help="print a record for machines.json with the rates found")
    parser.add_argument("--until", metavar="STAGE", help="end with this stage, e.g. train: only what it needs runs")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each task as it ends, and one as the last line"
    )
    args = parser.parse_intermixed_args(arguments)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="prefixquant-rehearsal-"))
    try:
        found = rehearse(
            args.shape,
            args.blocks,
            folder,
            recipe=args.recipe,
            overrides=args.overrides,
            vocabulary=args.vocabulary,
            inline=args.inline,
            until=args.until,
            on_record=_print_json if args.json else _say,
        )
    except PrefixQuantError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{args.shape}, {args.blocks} blocks, {found.checkpoint_bytes / 1e9:.2f} GB made in "
        f"{found.checkpoint_seconds:.1f} s, on {found.device}, torch {torch.__version__}; "
        f"{found.result.seconds:.1f} s in all"
    )
    print("\n".join(table(found.checks)))
    gpu_bytes = max((each.device_bytes for each in found.checks), default=0)
    host_bytes = max((each.host_bytes for each in found.checks), default=0)
    print(f"at most {gpu_bytes / 1e9:.1f} GB on the GPU and {host_bytes / 1e9:.1f} GB in host memory")
    if args.fit:
        print(json.dumps(asdict(found.fitted) | {"measured": f"rehearsal of {args.blocks} blocks of {args.shape}"}))
    for failure in found.result.failures:
        print(f"{failure}\n{failure.detail}", file=sys.stderr)
    if args.json:
        print(json.dumps({"device": found.device, "stages": [each.to_json() for each in found.checks]}))
    return 0 if found.result.ok else 1


def _print_json(record: Record) -> None:
    print(json.dumps(record), flush=True)


def _say(record: Record) -> None:
    where = record.get("node", record.get("stage"))
    at = f"[{record['at']:.1f} s] " if "at" in record else ""
    if "seconds" in record:
        said = f"{record['seconds']:.2f} s"
    else:
        said = next(str(record[kind]) for kind in ("failed", "repaired", "reduced", "text") if kind in record)
    print(f"{at}{where} {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
