"""What happens inside a Ray task: load inputs by key, run the task's function, publish what it returns."""

import ctypes
import gc
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from prefixquant.cluster.ray_session import assigned_gpus
from prefixquant.cluster.store import ArtifactStore
from prefixquant.cluster.worker_group import Membership
from prefixquant.pipeline.access import Byproduct, InputKeys, LazyInputs, Products, Traffic
from prefixquant.pipeline.artifacts import publish_artifact, scratch_folder
from prefixquant.pipeline.graph import GraphError, Task
from prefixquant.pipeline.keys import plain_config
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.parallel import Ranks
from prefixquant.tasks.steps import SingleRank

Post = Callable[[str, Mapping[str, float], int], None]
"""Says where a task is: a line for people, numbers for tracking, and their step."""


def post_nothing(text: str, metrics: Mapping[str, float], step: int) -> None:
    """Say nothing."""


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

    products: Products | None = None
    """All byproducts: those that are stored already, and where to publish one before the task ends."""

    ranks: Ranks = field(default_factory=SingleRank)
    """The processes that run this node together. What rank 0 returns counts."""

    post: Post = post_nothing
    """Tells the run how far the task is."""

    traffic: Traffic = field(default_factory=Traffic)
    """Bytes moved so far. Inputs and products are counted; what a task reads besides it adds itself."""

    scratch: Callable[[], Path] | None = None
    """Makes the folder for large files of this task (once); it goes when the artifact is stored."""

    parts: int = 1
    """By how much less than usual passes a block at once; 2 after the GPU's memory did not suffice."""


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
    """Labels of its byproducts that are in the store."""

    read_bytes: int = 0
    """Read from the store and the checkpoint."""

    written_bytes: int = 0
    """Written to the store, byproducts included."""

    processor_seconds: float = 0.0
    """Of this process, all threads, in that time: what a busy machine does not lengthen. 0: not known."""


class Messages(Protocol):
    """Takes what a task says while it is under way: the mailbox of a run on Ray, for one."""

    def put(self, message: dict[str, Any]) -> None:
        """Take a message, without waiting."""

    def flush(self) -> object:
        """Wait until all messages have gone."""


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
    byproducts: Mapping[str, Byproduct]
    """By label."""

    cpus: int
    """Torch threads."""

    mailbox: Messages | None = None
    """Where to say how far the task is."""

    sharding: str = "rows"
    """How several processes divide what they train: `rows` (tasks/sharded_steps.py), or `zero` (DeepSpeed)."""

    parts: int = 1
    """See `TaskContext.parts`."""


def run_member(member: Membership, call: NodeCall) -> NodeResult:
    """Run the node on one of several processes that work on it together; rank 0 publishes."""
    with _joined(member, call.sharding, _device(), call.parts) as ranks:
        return run_node(call, ranks)


@contextmanager
def _joined(member: Membership, sharding: str, device: torch.device, parts: int) -> Iterator[Ranks]:
    """Give this process's place among those that train together."""
    if sharding == "zero":
        from prefixquant.cluster.deepspeed_ranks import join

        with join(member, device, parts=parts) as zero:
            yield zero
        return
    from prefixquant.cluster.process_group import process_group
    from prefixquant.tasks.sharded_steps import ShardedRanks

    with process_group(member, device):
        rows = ShardedRanks(parts=parts)
        yield rows
        rows.close()


def run_node(call: NodeCall, ranks: Ranks | None = None, device: torch.device | str | None = None) -> NodeResult:
    """Run the task, publish its artifact and then its byproducts, and return what it cost.

    `ranks`: the processes that run it together; None: it is this one. `device`: where; None: the GPU that Ray has
    assigned, or the CPU.

    Raises what the task raises, ArtifactMissing or ArtifactCorrupted for an input, StoreUnwritable.
    """
    _freeze_imports()
    device = _device() if device is None else torch.device(device)
    torch.set_num_threads(call.cpus)
    _reset_peaks(device)
    try:
        ranks = ranks or SingleRank(parts=call.parts)
        return _run_and_publish(call, ArtifactStore(call.store_url), device, ranks)
    except Exception as err:
        traceback.clear_frames(err.__traceback__)  # their tensors would outlive the task with the error
        raise
    finally:
        _release(device)


def _run_and_publish(call: NodeCall, store: ArtifactStore, device: torch.device, ranks: Ranks) -> NodeResult:
    with ExitStack() as stack:
        scratch = cache(lambda: stack.enter_context(scratch_folder(store)))
        return _run_in(call, store, device, ranks, scratch)


def _run_in(
    call: NodeCall, store: ArtifactStore, device: torch.device, ranks: Ranks, scratch: Callable[[], Path]
) -> NodeResult:
    start, processor_start = time.perf_counter(), time.process_time()
    assert call.task.run is not None, f"{call.node} can only be yielded"
    wanted = frozenset(label for label, each in call.byproducts.items() if each.wanted)
    send = _sender(call, ranks)
    traffic = Traffic()
    products = Products(
        store,
        call.byproducts,
        publishes=ranks.rank == 0,
        on_published=lambda label: send({"product": label}),
        traffic=traffic,
    )
    context = TaskContext(
        config=call.config,
        inputs=LazyInputs(store, call.input_keys, traffic),
        device=device,
        byproducts=wanted,
        products=products,
        ranks=ranks,
        post=lambda text, metrics, step: send({"text": text, "metrics": dict(metrics), "step": step}),
        traffic=traffic,
        scratch=scratch,
        parts=call.parts,
    )
    output = call.task.run(context)
    missing = sorted(wanted - output.byproducts.keys() - set(products.stored())) if ranks.rank == 0 else []
    if missing:
        raise GraphError(f"task {call.task.name!r} did not yield {missing}, which node {call.node!r} declares")
    result = NodeResult(
        seconds=time.perf_counter() - start,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        stored_bytes=0,
        metrics={name: float(value) for name, value in output.metrics.items()},
        read_bytes=traffic.read,
        processor_seconds=time.process_time() - processor_start,
    )
    if ranks.rank != 0:
        return result
    meta = {
        "task": call.task.name,
        "version": call.task.version,
        "config": plain_config(call.config),
        "inputs": {name: key if isinstance(key, str) else list(key) for name, key in call.input_keys.items()},
        "node": call.node,
        "seconds": result.seconds,
        "processor_seconds": result.processor_seconds,
        "peak_host_bytes": result.peak_host_bytes,
        "peak_device_bytes": result.peak_device_bytes,
        "read_bytes": result.read_bytes,
        "metrics": result.metrics,
        "parts": call.parts,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": _versions(),
    }
    manifest = publish_artifact(store, call.key, output.artifact, meta)
    for label in sorted(wanted & output.byproducts.keys()):
        products.publish(label, output.byproducts[label], {})
    if call.mailbox is not None:
        call.mailbox.flush()
    return replace(
        result,
        seconds=time.perf_counter() - start,
        stored_bytes=manifest.size,
        written_bytes=manifest.size + traffic.written,
        byproducts=products.stored(),
        processor_seconds=time.process_time() - processor_start,
    )


def _sender(call: NodeCall, ranks: Ranks) -> Callable[[dict[str, Any]], None]:
    """Return what sends a message of this node to the run."""

    def send(message: dict[str, Any]) -> None:
        if call.mailbox is not None and ranks.rank == 0:
            call.mailbox.put({"key": call.key, **message})

    return send


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
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return the function of glibc that returns freed memory to the system; None where there is another C library."""
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def _reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()  # the statistics exist only from then on
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc); the process may be reused
    except OSError:
        return  # no such file here: the peak then covers the whole life of the process


def peak_host_bytes() -> int:
    """Return the largest resident memory of this process since a task began, or where that is not known, ever."""
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
