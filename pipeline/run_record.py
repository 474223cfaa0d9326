"""A run's record: its reference in the store, and what MLflow shows of it."""

import hashlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefixquant.cluster.store import ArtifactError, ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, load_record
from prefixquant.pipeline.build import targets
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.outcome import Event
from prefixquant.pipeline.recipe import Recipe
from prefixquant.pipeline.tracking import Tracker, flatten
from prefixquant.pipeline.training import epoch_metrics, epoch_step
from prefixquant.pipeline.worker import NodeResult

EXPERIMENT = "prefixquant"

_BLOCK_METRICS = {
    "block": ("block", "error"),
    "trained": ("block", "loss_after"),
    "polished": ("polish_block", "loss_after"),
}
"""Task -> where the metrics of its blocks go, and one that it always has."""


def _block_of(node: str) -> int:
    return int(node.partition("[")[2].removesuffix("]"))


def previous_keys(store: ArtifactStore, name: str) -> dict[str, str]:
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


def stage_seconds(graph: Graph, done: Mapping[str, NodeResult]) -> dict[str, float]:
    """Return the seconds of the tasks that ran, summed by stage."""
    seconds: dict[str, float] = {}
    for name, each in done.items():
        stage = graph.nodes[name].task.name
        seconds[stage] = seconds.get(stage, 0.0) + each.seconds
    return seconds


class RunRecord:
    """What the store and MLflow hold of a run, from its begin to its end."""

    def __init__(self, recipe: Recipe, graph: Graph, store: ArtifactStore, tracking: str | None) -> None:
        """`tracking`: MLflow URI. None: that of the store. "off": none."""
        self.recipe, self.graph, self.store, self.tracking = recipe, graph, store, tracking
        wanted = "".join(graph.key(name) for name in targets(graph))
        self.run_id = f"{recipe.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:10]}"
        self.tracker = Tracker()
        known = self.store.read_ref(self.run_id) if self.run_id in self.store.run_ids() else {}
        self.finished_before = known.get("status") == "finished"
        self.mlflow_run_id: str | None = known.get("mlflow_run_id")
        self._logged: dict[str, set[int]] = {}

    def begin(self, *, something: bool) -> None:
        """Note that the run is under way; `something`: whether a task is to run."""
        self._write_ref("running")
        if something or not self.finished_before:
            self._start_tracking()

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
        uri = self.tracking or _default_tracking(self.store)
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

    def track(self, event: Event) -> None:
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
            metrics |= {f"seconds/{stage}": each for stage, each in stage_seconds(self.graph, done).items()}
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


def _default_tracking(store: ArtifactStore) -> str | None:
    """Return the MLflow URI of a store: a SQLite file inside a local one, none for a remote one."""
    return f"sqlite:///{Path(store.root).absolute()}/mlflow.db" if store.is_local else None


def _revision() -> dict[str, str]:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return {}  # installed from a wheel
    return {"git_revision": done.stdout.strip()}
