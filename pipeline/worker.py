"""What happens inside a Ray task: load inputs by key, run the task's function, publish what it returns."""

import gc
import platform
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, overload

import torch

from prefixquant.cluster.ray_session import assigned_gpus
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, load_record, publish_artifact
from prefixquant.pipeline.graph import GraphError, Task
from prefixquant.pipeline.keys import plain_config
from prefixquant.tasks.artifact import Artifact

InputKeys = Mapping[str, str | tuple[str, ...]]


class LazyArtifacts(Sequence[Artifact]):
    """Artifacts that are loaded, and verified, each time one is taken; none is kept."""

    def __init__(self, store: ArtifactStore, keys: Sequence[str]) -> None:
        self._store, self._keys = store, tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Artifact: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyArtifacts": ...
    def __getitem__(self, index: int | slice) -> "Artifact | LazyArtifacts":
        if isinstance(index, slice):
            return LazyArtifacts(self._store, self._keys[index])
        return load_artifact(self._store, self._keys[index])

    def records(self) -> Iterator[dict[str, Any]]:
        """Give the artifacts' records alone, without reading their tensors."""
        return (load_record(self._store, key) for key in self._keys)


class LazyInputs(Mapping[str, Any]):
    """Argument -> Artifact, or LazyArtifacts where the graph names several producers. Loaded when taken, not kept."""

    def __init__(self, store: ArtifactStore, keys: InputKeys) -> None:
        self._store, self._keys = store, keys

    def __getitem__(self, name: str) -> Any:
        key = self._keys[name]
        return load_artifact(self._store, key) if isinstance(key, str) else LazyArtifacts(self._store, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, slots=True)
class TaskContext:
    """All that a task's function gets."""

    config: Any
    """The node's config."""

    inputs: Mapping[str, Any]
    """Argument -> Artifact (tensors on CPU), or a sequence of them. Taking one reads it from the store."""

    device: torch.device
    """Where to compute."""

    byproducts: frozenset[str] = frozenset()
    """Labels of the byproducts the graph has a use for; others need not be computed."""


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """What a task's function returns."""

    artifact: Artifact
    """The node's own artifact."""

    byproducts: dict[str, Artifact] = field(default_factory=dict)
    """Label -> artifact of another node that this run has computed as well."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers for tracking. They are kept in the manifest, so a cached node still has them."""


@dataclass(frozen=True, slots=True)
class NodeResult:
    """What one execution cost and measured."""

    seconds: float
    """Wall clock, publishing included."""

    peak_host_bytes: int
    """Largest resident memory of the worker process, libraries included."""

    peak_device_bytes: int
    """Largest GPU memory held by tensors, 0 on CPU."""

    stored_bytes: int
    """Size of the node's own artifact."""

    metrics: dict[str, float]
    """What the task reported."""

    byproducts: tuple[str, ...] = ()
    """Labels of the byproducts published with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCall:
    """Everything a worker needs to run one node; small, since artifacts go by key."""

    store_url: str
    node: str
    task: Task
    config: Any
    key: str
    """Of the node's artifact."""

    input_keys: InputKeys
    byproduct_keys: Mapping[str, str]
    """Label -> key, of the byproducts to publish."""

    cpus: int
    """Torch threads."""


def run_node(call: NodeCall) -> NodeResult:
    """Run the task, publish its artifact and then its byproducts, and return what it cost.

    Raises what the task raises, ArtifactMissing or ArtifactCorrupted for an input, StoreUnwritable.
    """
    _freeze_imports()
    device = _device()
    torch.set_num_threads(call.cpus)
    _reset_peaks(device)
    try:
        return _run_and_publish(call, ArtifactStore(call.store_url), device)
    except Exception as err:
        traceback.clear_frames(err.__traceback__)  # their tensors would outlive the task with the error
        raise
    finally:
        _release(device)


def _run_and_publish(call: NodeCall, store: ArtifactStore, device: torch.device) -> NodeResult:
    start = time.perf_counter()
    inputs = LazyInputs(store, call.input_keys)
    output = call.task.run(TaskContext(call.config, inputs, device, frozenset(call.byproduct_keys)))
    missing = sorted(call.byproduct_keys.keys() - output.byproducts.keys())
    if missing:
        raise GraphError(f"task {call.task.name!r} did not yield {missing}, which node {call.node!r} declares")
    result = NodeResult(
        seconds=time.perf_counter() - start,
        peak_host_bytes=_peak_host_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        stored_bytes=0,
        metrics={name: float(value) for name, value in output.metrics.items()},
        byproducts=tuple(call.byproduct_keys),
    )
    meta = {
        "task": call.task.name,
        "version": call.task.version,
        "config": plain_config(call.config),
        "inputs": {name: key if isinstance(key, str) else list(key) for name, key in call.input_keys.items()},
        "node": call.node,
        "seconds": result.seconds,
        "peak_host_bytes": result.peak_host_bytes,
        "peak_device_bytes": result.peak_device_bytes,
        "metrics": result.metrics,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": _versions(),
    }
    manifest = publish_artifact(store, call.key, output.artifact, meta)
    for label, key in call.byproduct_keys.items():
        publish_artifact(store, key, output.byproducts[label], {"node": call.node, "byproduct": label})
    stored_bytes = sum(entry.size for entry in manifest.files.values())
    return replace(result, seconds=time.perf_counter() - start, stored_bytes=stored_bytes)


def _device() -> torch.device:
    # Ray leaves all GPUs visible to a task that was given none, so torch.cuda.is_available() alone says nothing.
    return torch.device("cuda", 0) if assigned_gpus() and torch.cuda.is_available() else torch.device("cpu")


@cache
def _freeze_imports() -> None:
    """Take what is imported out of the collector's sight: it costs a tenth of a second after every task."""
    gc.collect()
    gc.freeze()


def _release(device: torch.device) -> None:
    """Give memory back: the worker process lives on and the next task may get another one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()  # the statistics exist only from then on
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc); the process may be reused
    except OSError:
        return  # no such file here: the peak then covers the whole life of the process


def _peak_host_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("prefixquant", "torch", "transformers", "triton", "ray"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
