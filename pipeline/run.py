"""One run of a recipe: source, graph, plan, execution, tracking, output folder."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefixquant.cluster.ray_session import RaySession, connect
from prefixquant.cluster.store import ArtifactCorrupted, ArtifactMissing, ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.build import Source, build_graph, targets
from prefixquant.pipeline.build_evaluation import is_result
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.loading import known_model, look_over, prepare
from prefixquant.pipeline.machines import local_machine, machine_of
from prefixquant.pipeline.outcome import Event
from prefixquant.pipeline.output import check_place, write_model
from prefixquant.pipeline.plan import Plan, make_plan
from prefixquant.pipeline.progress import make_progress
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.run_record import RunRecord, previous_keys, stage_seconds
from prefixquant.pipeline.runner import execute
from prefixquant.tasks.errors import ConfigError

_MAX_REPAIRS = 10  # of artifacts that this process finds damaged


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where a run takes place; nothing of it enters an artifact's key."""

    store: str
    out: Path | str | None = None
    """Folder, or URL, that gets the loadable model."""
    tracking: str | None = None
    """MLflow URI. None: a SQLite file beside a local store. "off": no tracking."""
    address: str | None = None
    """Of a Ray cluster; None starts a local one."""
    cpus: int | None = None
    gpus: int | None = None
    ranks: int | None = None
    """Processes that train a block together. None: as many as the GPUs allow."""
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a finished run says of itself."""

    run_id: str
    record: dict[str, Any]
    """The report's record: prefix, blocks, perplexity."""
    tasks_run: int
    tasks_cached: int
    seconds: float
    stage_seconds: dict[str, float]
    """Seconds of the tasks that ran, summed by stage."""
    peak_host_bytes: int
    """Largest resident memory of a task's process."""
    peak_device_bytes: int
    """Largest GPU memory of a task."""
    out: str | None
    mlflow_url: str | None
    tracking_failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object `--json` prints."""
        ppl = {(m["model"], m["text"]): m["ppl"] for m in self.record["perplexity"]}
        first = next((text for _, text in ppl), None)
        return {
            "run_id": self.run_id,
            "out": self.out,
            "prefix_token_ids": self.record["prefix"]["token_ids"],
            "ppl": ppl.get(("quantized", first)),
            "ppl_full_precision": ppl.get(("full precision", first)),
            "ppl_without_prefix": ppl.get(("quantized without prefix", first)),
            "perplexity": self.record["perplexity"],
            "tasks": self.record["tasks"],
            "tasks_run": self.tasks_run,
            "tasks_cached": self.tasks_cached,
            "seconds": round(self.seconds, 2),
            "stage_seconds": {stage: round(seconds, 2) for stage, seconds in self.stage_seconds.items()},
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
        }


def open_store(url: str) -> ArtifactStore:
    """Return the store after checking that it can be written.

    Raises:
        StoreUnwritable: it cannot.
        ConfigError: workers could not see it.
    """
    if url.startswith("memory:"):
        raise ConfigError(f"--store {url} lives in this process alone, workers cannot see it; give a folder or a URL")
    store = ArtifactStore(url)
    store.check_writable()
    return store


def plan_recipe(recipe: Recipe, store_url: str) -> tuple[Graph, Plan]:
    """Return the graph of a recipe and what a run of it would do here; starts nothing and writes nothing."""
    store = ArtifactStore(store_url)
    source, model = known_model(recipe, store)
    graph = build_graph(recipe, source, model, machine=local_machine(), workers=local_workers())
    return graph, plan_graph(graph, store, recipe.name)


def local_workers() -> int:
    """Return how many tasks run at once on the local cluster that a run would start."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def plan_graph(graph: Graph, store: ArtifactStore, name: str) -> Plan:
    """Return what a run of a recipe's graph would do, with the reasons since the last run of a recipe of this name."""
    return make_plan(graph, targets(graph), store, previous_keys(store, name))


def run_recipe(recipe: Recipe, options: RunOptions) -> RunSummary:
    """Build what a recipe lacks, track it, and write the output folder.

    Raises:
        RunFailedError: a task failed; independent tasks have finished and are stored.
        PrefixQuantError, ArtifactError: recipe, model, text, store or output folder are wrong.
    """
    start = time.monotonic()
    if options.ranks is not None:
        _check_ranks(options.ranks, recipe)
    if options.out is not None:
        check_place(options.out)
    store = open_store(options.store)
    source = prepare(recipe)
    repairs = 0
    with _lazy_session(options) as session:
        while True:
            try:
                return _run_once(recipe, options, store, source, session, start)
            except (ArtifactCorrupted, ArtifactMissing) as err:
                # Found by this process; the runner repairs what a task finds. Discarded, it is built again.
                repairs += 1
                if err.key is None or repairs > _MAX_REPAIRS:
                    raise
                store.discard(err.key)


def _check_ranks(ranks: int, recipe: Recipe) -> None:
    """Raise ConfigError if training cannot be shared by so many processes."""
    if recipe.train is None:
        raise ConfigError(f"--ranks {ranks} is for training, and the recipe has none; leave it out")
    if ranks < 1 or recipe.train.batch_size % ranks:
        raise ConfigError(
            f"--ranks {ranks} cannot share train.batch_size {recipe.train.batch_size} equally; give a divisor of it"
        )


def _run_once(
    recipe: Recipe,
    options: RunOptions,
    store: ArtifactStore,
    source: Source,
    session: Callable[[], RaySession],
    start: float,
) -> RunSummary:
    model, loaded = look_over(source, store, session)
    graph, workers = build_graph(recipe, source, model, machine=local_machine()), 1
    if any(is_result(node) and not store.has(graph.key(name)) for name, node in graph.nodes.items()):
        workers = session().workers
        graph = build_graph(recipe, source, model, machine=local_machine(), workers=workers)
    run = RunRecord(recipe, graph, store, options.tracking)
    plan = plan_graph(graph, store, recipe.name)
    something = any(entry.state in ("run", "yielded") for entry in plan.entries)
    done = loaded
    with run.recorded():
        run.begin(something=something)
        if something:
            with make_progress(options.quiet, plan) as progress:

                def on_event(event: Event) -> None:
                    progress(event)
                    run.track(event)

                here, ranks = session(), options.ranks
                there = build_graph(recipe, source, model, machine=machine_of(here.gpu()), workers=workers)
                result = execute(there, targets(there), store, here, ranks=ranks, on_event=on_event)
            result.require()
            done = loaded | result.results
        record = load_artifact(store, graph.key("report")).record
        if options.out is not None:
            write_model(graph, store, options.out, model.num_blocks)
        run.finish(record, done, time.monotonic() - start)
    return RunSummary(
        run_id=run.run_id,
        record=record,
        tasks_run=len(done),
        tasks_cached=len(set(plan.names("cached")) - done.keys()),
        seconds=time.monotonic() - start,
        stage_seconds=stage_seconds(graph, done),
        peak_host_bytes=max((each.peak_host_bytes for each in done.values()), default=0),
        peak_device_bytes=max((each.peak_device_bytes for each in done.values()), default=0),
        out=str(options.out) if options.out is not None else None,
        mlflow_url=run.tracker.url_hint or None,
        tracking_failures=tuple(run.tracker.failures),
    )


@contextmanager
def _lazy_session(options: RunOptions) -> Iterator[Callable[[], RaySession]]:
    """Give a function that connects to Ray when first called: a run with nothing to do needs none."""
    opened: list[AbstractContextManager[RaySession]] = []

    def session() -> RaySession:
        if not opened:
            opened.append(connect(options.address, num_cpus=options.cpus, num_gpus=options.gpus))
        return opened[0]  # type: ignore[return-value]

    try:
        yield session
    finally:
        for each in opened:
            each.__exit__(None, None, None)
