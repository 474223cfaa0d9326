"""One run of a recipe: source, graph, plan, execution, tracking, output folder."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prefixquant.cluster.ray_session import RaySession, connect
from prefixquant.cluster.store import ArtifactCorrupted, ArtifactError, ArtifactMissing, ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, load_record
from prefixquant.pipeline.build import Source, build_graph, targets
from prefixquant.pipeline.build_evaluation import is_result
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.loading import known_model, look_over, prepare
from prefixquant.pipeline.machines import local_machine, machine_of
from prefixquant.pipeline.outcome import Event, RunResult
from prefixquant.pipeline.output import check_place, write_model
from prefixquant.pipeline.plan import Plan, make_plan
from prefixquant.pipeline.progress import make_progress
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.runner import execute
from prefixquant.pipeline.tracking import Tracker, flatten
from prefixquant.pipeline.training import epoch_metrics, epoch_step
from prefixquant.pipeline.worker import NodeResult
from prefixquant.tasks.errors import ConfigError

EXPERIMENT = "prefixquant"

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
    return make_plan(graph, targets(graph), store, _previous(store, name))


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

    def rebuild(gpu: tuple[str, int] | None) -> Graph:
        return build_graph(recipe, source, model, machine=machine_of(gpu), workers=workers)

    run = _Tracked(recipe, graph, store, options, rebuild)
    plan = make_plan(graph, targets(graph), store, _previous(store, recipe.name))
    with run.recorded():
        result = run.execute(plan, session)
        record = load_artifact(store, graph.key("report")).record
        if options.out is not None:
            write_model(graph, store, options.out, model.num_blocks)
        done = loaded if result is None else loaded | result.results
        run.finish(record, done, time.monotonic() - start)
    return RunSummary(
        run_id=run.run_id,
        record=record,
        tasks_run=len(done),
        tasks_cached=len(set(plan.names("cached")) - done.keys()),
        seconds=time.monotonic() - start,
        stage_seconds=_stage_seconds(graph, done),
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


def _previous(store: ArtifactStore, name: str) -> dict[str, str]:
    """Return node name -> key of the last run of a recipe of this name."""
    found: list[tuple[float, dict[str, str]]] = []
    for run_id in store.run_ids():
        try:
            record = store.read_ref(run_id)
        except ArtifactError:
            continue  # an unreadable record serves the plan's reasons only
        if record.get("name") == name:
            found.append((record.get("updated", 0.0), record.get("keys", {})))
    return max(found, key=lambda pair: pair[0])[1] if found else {}


_BLOCK_METRICS = {
    "block": ("block", "error"),
    "trained": ("block", "loss_after"),
    "polished": ("polish_block", "loss_after"),
}
"""Task -> where the metrics of its blocks go, and one that it always has."""


def _block_of(node: str) -> int:
    return int(node.partition("[")[2].removesuffix("]"))


class _Tracked:
    """A run's record in the store and in MLflow."""

    def __init__(
        self,
        recipe: Recipe,
        graph: Graph,
        store: ArtifactStore,
        options: RunOptions,
        rebuild: Callable[[tuple[str, int] | None], Graph],
    ) -> None:
        """`rebuild` returns the graph with the estimates of the cluster's GPU, given by name and memory."""
        self.recipe, self.graph, self.store, self.options, self.rebuild = recipe, graph, store, options, rebuild
        wanted = "".join(graph.key(name) for name in targets(graph))
        self.run_id = f"{recipe.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:10]}"
        self.tracker = Tracker()
        known = self.store.read_ref(self.run_id) if self.run_id in self.store.run_ids() else {}
        self.finished_before = known.get("status") == "finished"
        self.mlflow_run_id: str | None = known.get("mlflow_run_id")
        self._logged: dict[str, set[int]] = {}

    def execute(self, plan: Plan, session: Callable[[], RaySession]) -> RunResult | None:
        """Run what the plan says and return the result, or None if nothing is to be done.

        Raises:
            RunFailedError: a task failed or the run was interrupted.
        """
        self._write_ref("running")
        something = any(entry.state in ("run", "yielded") for entry in plan.entries)
        if something or not self.finished_before:
            self._start_tracking()
        if not something:
            return None
        with make_progress(self.options.quiet, plan) as progress:

            def on_event(event: Event) -> None:
                progress(event)
                self._track(event)

            here, wanted, ranks = session(), targets(self.graph), self.options.ranks
            result = execute(self.rebuild(here.gpu()), wanted, self.store, here, ranks=ranks, on_event=on_event)
        result.require()
        return result

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the context, an error also ends the run's record and its MLflow run."""
        try:
            yield
        except BaseException as err:
            interrupted = isinstance(err, KeyboardInterrupt) or getattr(err, "interrupted", False)
            with suppress(ArtifactError):  # on a full disk it would hide which task failed
                self._write_ref("interrupted" if interrupted else "failed")
            self.tracker.finish("KILLED" if interrupted else "FAILED")
            raise

    def _start_tracking(self) -> None:
        uri = self.options.tracking or default_tracking(self.store)
        if uri is None or uri == "off":
            return
        self.tracker = Tracker.start(
            uri=uri,
            experiment=EXPERIMENT,
            run_name=self.recipe.name,
            run_id=self.mlflow_run_id,
            params=flatten(self.recipe.resolved()),
            tags={"run_id": self.run_id, "store": self.store.url, "prefixquant": version("prefixquant"), **_revision()},
        )
        self.mlflow_run_id = self.tracker.run_id
        self.tracker.log_dict(self.recipe.resolved(), "recipe.json")
        self._write_ref("running")

    def _track(self, event: Event) -> None:
        """Log what comes of a block, stepped by block, and of an epoch of its training."""
        if event.kind == "progress" and event.metrics and event.node.endswith("]"):
            self._log_once(event.metrics, event.task, event.step, sign="loss")
        elif event.kind == "done" and event.task in _BLOCK_METRICS and event.node.endswith("]"):
            metrics = dict(event.result.metrics if event.result is not None else self._stored_metrics(event.node))
            if event.result is not None:
                metrics["seconds"] = event.result.seconds
            self._log_block(event.task, event.node, metrics)

    def _log_block(self, task: str, node: str, metrics: Mapping[str, float]) -> None:
        kept = {name: value for name, value in metrics.items() if task == "block" or name != "seconds"}
        prefix, sign = _BLOCK_METRICS[task]
        self._log_once(kept, prefix, _block_of(node), sign=sign)

    def _log_once(self, metrics: Mapping[str, float], prefix: str, step: int, *, sign: str) -> None:
        """Log metrics at a step that has none of them yet, as the one named `sign` tells."""
        name = f"{prefix}/{sign}"
        if name not in self._logged:
            self._logged[name] = self.tracker.steps(name)
        if step not in self._logged[name]:
            self._logged[name].add(step)
            self.tracker.log_metrics({f"{prefix}/{key}": value for key, value in metrics.items()}, step=step)

    def _stored_metrics(self, node: str) -> dict[str, float]:
        metrics: dict[str, float] = self.store.manifest(self.graph.key(node)).meta.get("metrics", {})
        return metrics

    def finish(self, record: dict[str, Any], done: Mapping[str, NodeResult], seconds: float) -> None:
        """Log the end of the run and mark it finished."""
        tracker = self.tracker
        if tracker.run_id is not None:
            self._log_missing_blocks()
            metrics: dict[str, float] = {"seconds": seconds, "prefix/num_tokens": len(record["prefix"]["token_ids"])}
            metrics |= _measured(record)
            for name, node in self.graph.nodes.items():
                if node.task.name == "export_profile":
                    prefix = f"export/{node.config.profile}"
                    metrics |= {f"{prefix}/{key}": each for key, each in self._stored_metrics(name).items()}
            errors = [block["error"] for block in record["blocks"]]
            metrics["block_error/mean"] = sum(errors) / len(errors)
            metrics |= {f"seconds/{stage}": each for stage, each in _stage_seconds(self.graph, done).items()}
            if done:
                metrics["memory/peak_host_gb"] = max(each.peak_host_bytes for each in done.values()) / 1e9
                metrics["memory/peak_device_gb"] = max(each.peak_device_bytes for each in done.values()) / 1e9
            tracker.log_metrics(metrics)
            tracker.log_dict(record, "report.json")
            report = load_artifact(self.store, self.graph.key("report")).files["report.md"].decode()
            tracker.log_text(report, "report.md")
            tagged = ("load", "prefix", "export", "report")
            tracker.set_tags({f"artifact.{name}": self.graph.key(name) for name in tagged})
            tracker.finish("FINISHED")
        self._write_ref("finished", ppl=record["perplexity"], tasks=record["tasks"])

    def _log_missing_blocks(self) -> None:
        """Log what MLflow lacks of the blocks: an earlier run stored them, or died before it could send it."""
        for name, node in self.graph.nodes.items():
            task = node.task.name
            if task not in _BLOCK_METRICS or not name.endswith("]"):
                continue
            self._log_block(task, name, self._stored_metrics(name))
            if task != "block":
                self._log_epochs(name)

    def _log_epochs(self, name: str) -> None:
        """Log the epochs of a trained block that MLflow lacks."""
        run = self.graph.nodes[self.graph.parents(name)[0]]
        for epoch in load_record(self.store, self.graph.key(name))["epochs"]:
            step = epoch_step(epoch["block"], epoch["epoch"], run.config.train.epochs)
            self._log_once(epoch_metrics(epoch), run.task.name, step, sign="loss")

    def _write_ref(self, status: str, **extra: Any) -> None:
        record = {
            "name": self.recipe.name,
            "status": status,
            "updated": time.time(),
            "keys": {name: self.graph.key(name) for name in self.graph.order},
            "recipe": self.recipe.resolved(),
            "mlflow_run_id": self.mlflow_run_id,
            **extra,
        }
        self.store.write_ref(self.run_id, record)


def _measured(record: dict[str, Any]) -> dict[str, float]:
    """Return perplexities and what tasks gave, by names that MLflow takes."""
    named = {(f"{each['text']}_ppl", each["model"]): each["ppl"] for each in record["perplexity"]}
    for each in record["tasks"]:
        for metric, value in each["metrics"].items():
            named[f"{each['task']}_{metric}", each["model"]] = value
            if each["stderr"][metric] is not None:
                named[f"{each['task']}_{metric}_stderr", each["model"]] = each["stderr"][metric]
    plain = re.compile(r"[^\w.-]")
    return {f"eval/{plain.sub('_', name)}/{model.replace(' ', '_')}": value for (name, model), value in named.items()}


def default_tracking(store: ArtifactStore) -> str | None:
    """Return the MLflow URI of a store: a SQLite file inside a local one, none for a remote one."""
    return f"sqlite:///{Path(store.root).absolute()}/mlflow.db" if store.is_local else None


def _stage_seconds(graph: Graph, done: Mapping[str, NodeResult]) -> dict[str, float]:
    """Return the seconds of the tasks that ran, summed by stage."""
    seconds: dict[str, float] = {}
    for name, each in done.items():
        stage = graph.nodes[name].task.name
        seconds[stage] = seconds.get(stage, 0.0) + each.seconds
    return seconds


def _revision() -> dict[str, str]:
    import subprocess

    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return {}  # installed from a wheel
    return {"git_revision": done.stdout.strip()}
