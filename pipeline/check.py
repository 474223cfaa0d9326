"""Predictions against what finished tasks took, by stage; and the rates of a machine that follow from it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from prefixquant.cluster.store import ArtifactMissing, ArtifactStore
from prefixquant.pipeline.estimates import estimate, work_of
from prefixquant.pipeline.graph import Estimate, Graph
from prefixquant.pipeline.machines import Machine, Work
from prefixquant.pipeline.shape import Shape
from prefixquant.pipeline.worker import NodeResult

FORWARD_STAGES = ("prefix", "calibrate", "stream", "evaluate", "evaluate_part")
"""Stages that do little else than pass tokens through blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a task took."""

    seconds: float
    host_bytes: int
    device_bytes: int
    read_bytes: int
    written_bytes: int
    """To the store; of a task known from its manifest, its own artifact alone."""
    processor_seconds: float = 0.0
    """Of its process; 0: not known."""

    @classmethod
    def of(cls, result: NodeResult) -> "Measured":
        """Return what a task took that ran just now."""
        return cls(
            seconds=result.seconds,
            host_bytes=result.peak_host_bytes,
            device_bytes=result.peak_device_bytes,
            read_bytes=result.read_bytes,
            written_bytes=result.written_bytes,
            processor_seconds=result.processor_seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCheck:
    """One stage, predicted and measured."""

    stage: str
    tasks: int
    seconds: float
    """Sum over its tasks."""
    predicted_seconds: float
    slowest: float
    """Seconds of the slowest task."""
    host_bytes: int
    """Largest of its tasks."""
    predicted_host_bytes: int
    device_bytes: int
    """Largest of its tasks."""
    predicted_device_bytes: int
    read_bytes: int
    written_bytes: int
    processor_seconds: float = 0.0
    """Of its tasks' processes: on a machine without GPU that others use too, this is to be compared."""

    @property
    def seconds_ratio(self) -> float:
        """Predicted over measured seconds."""
        return self.predicted_seconds / self.seconds if self.seconds else 1.0

    @property
    def memory_ratio(self) -> float:
        """Predicted over measured memory, that of the GPU where there is one."""
        if self.device_bytes:
            return self.predicted_device_bytes / self.device_bytes
        return self.predicted_host_bytes / self.host_bytes if self.host_bytes else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return fields and ratios."""
        return {**asdict(self), "seconds_ratio": self.seconds_ratio, "memory_ratio": self.memory_ratio}


def stored_measurements(graph: Graph, store: ArtifactStore) -> tuple[dict[str, Measured], str]:
    """Return what the manifests remember of the graph's nodes that have run, and the device they ran on.

    Nodes that others yield are left out. The device is the name of a GPU, or `cpu` if none took part.
    """
    found: dict[str, Measured] = {}
    device = "cpu"
    for name in graph.order:
        try:
            manifest = store.manifest(graph.key(name))
        except ArtifactMissing:
            continue  # not run, or a stream that has served
        meta = manifest.meta
        if "seconds" not in meta or meta["inputs"].keys() != graph.nodes[name].inputs.keys():
            continue  # yielded by another node, or measured in parts, which are gone, or the other way round
        device = meta["device"] if meta["device"] != "cpu" else device
        found[name] = Measured(
            seconds=meta["seconds"],
            host_bytes=meta["peak_host_bytes"],
            device_bytes=meta["peak_device_bytes"],
            read_bytes=meta.get("read_bytes", 0),
            written_bytes=manifest.size,
            processor_seconds=meta.get("processor_seconds", 0.0),
        )
    return found, device


def compare(graph: Graph, measured: Mapping[str, Measured], shape: Shape, machine: Machine) -> list[StageCheck]:
    """Return predictions beside measurements, a row a stage that has any, in order."""
    stages: dict[str, list[tuple[Measured, Estimate]]] = {}
    for name in graph.order:
        if name in measured:
            node = graph.nodes[name]
            stages.setdefault(node.task.name, []).append((measured[name], estimate(node, shape, machine)))
    return [
        StageCheck(
            stage=stage,
            tasks=len(pairs),
            seconds=sum(took.seconds for took, _ in pairs),
            predicted_seconds=sum(cost.seconds for _, cost in pairs),
            slowest=max(took.seconds for took, _ in pairs),
            host_bytes=max(took.host_bytes for took, _ in pairs),
            predicted_host_bytes=max(cost.host_bytes for _, cost in pairs),
            device_bytes=max(took.device_bytes for took, _ in pairs),
            predicted_device_bytes=max(cost.device_bytes for _, cost in pairs),
            read_bytes=sum(took.read_bytes for took, _ in pairs),
            written_bytes=sum(took.written_bytes for took, _ in pairs),
            processor_seconds=sum(took.processor_seconds for took, _ in pairs),
        )
        for stage, pairs in stages.items()
    ]


_COLUMNS = (
    "stage",
    "tasks",
    "s",
    "plan",
    "ratio",
    "slowest",
    "cpu s",
    "host GB",
    "plan",
    "GPU GB",
    "plan",
    "ratio",
    "read",
    "wrote",
)


def table(rows: Iterable[StageCheck]) -> list[str]:
    """Return lines for people: measured, `plan` what was predicted, `ratio` predicted over measured.

    `cpu s`: seconds of the processor, to tell a wrong prediction from a machine that had other work.
    """
    lines = ["{:<10}{:>6}".format(*_COLUMNS[:2]) + "".join(f"{name:>9}" for name in _COLUMNS[2:])]
    for row in rows:
        seconds = (row.seconds, row.predicted_seconds, row.seconds_ratio, row.slowest, row.processor_seconds)
        memory = (row.host_bytes, row.predicted_host_bytes, row.device_bytes, row.predicted_device_bytes)
        moved = (row.read_bytes, row.written_bytes)
        cells = [*seconds, *(each / 1e9 for each in memory), row.memory_ratio, *(each / 1e9 for each in moved)]
        lines.append(f"{row.stage:<10}{row.tasks:>6}" + "".join(f"{cell:>9.2f}" for cell in cells))
    return lines


def fit(graph: Graph, measured: Mapping[str, Measured], shape: Shape, machine: Machine) -> Machine:
    """Return the machine with rates at which its predictions meet the measurements, stage by stage.

    Overheads and the rates of the store stay; what a stage took beyond them is shared in the proportions they have.
    A stage that took no longer than its overheads, or was not measured, changes nothing. On a CPU the seconds are those
    of the processor, where they are known: what else ran there is no property of the machine.
    """
    if not machine.is_gpu:
        measured = {
            name: replace(each, seconds=each.processor_seconds or each.seconds) for name, each in measured.items()
        }

    def stage_of(name: str) -> str:
        return graph.nodes[name].task.name

    fixed = {
        stage: max(0.0, _mean(measured[n].seconds for n in measured if stage_of(n) == stage) - machine.task_s)
        for stage in machine.seconds
        if any(stage_of(n) == stage for n in measured)
    }
    machine = replace(machine, seconds={**machine.seconds, **fixed})
    for stages, rates in (
        (FORWARD_STAGES, ("forward",)),
        (("rotate",), ("rotate",)),
        (("block",), ("search",)),
        (("train",), ("train",)),
    ):
        names = [name for name in measured if stage_of(name) in stages]
        works = [work_of(graph.nodes[name], shape, machine) for name in names]
        own = sum(machine.time(_only(work, rates)) - machine.time(Work(stage="none")) for work in works)
        rest = sum(machine.time(work) for work in works) - own
        left = sum(measured[name].seconds for name in names) - rest
        if own > 0 and left > 0:
            machine = _slowed(machine, rates, left / own)
    base = [measured[n].host_bytes - estimate(graph.nodes[n], shape, machine).host_bytes for n in measured]
    if base:
        machine = replace(machine, process_bytes=machine.process_bytes + sorted(base)[len(base) // 2])
    return machine


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _only(work: Work, rates: tuple[str, ...]) -> Work:
    """Return the part of the work that runs at rates of these names."""

    def chosen(amounts: Mapping[str, float]) -> dict[str, float]:
        return {kind: amount for kind, amount in amounts.items() if kind.split("_")[0] in rates}

    training = "train" in rates
    return Work(
        stage="none",
        flops=chosen(work.flops),
        elements=chosen(work.elements),
        updates=work.updates if training else 0,
        steps=work.steps if training else 0,
        eager_steps=work.eager_steps if training else 0,
        trained_blocks=work.trained_blocks if training else 0,
        forwards=work.forwards if "forward" in rates else 0,
    )


def _slowed(machine: Machine, rates: tuple[str, ...], factor: float) -> Machine:
    """Return the machine with the rates of these names `factor` times slower."""

    def divided(table: Mapping[str, float]) -> dict[str, float]:
        return {kind: rate / factor if kind.split("_")[0] in rates else rate for kind, rate in table.items()}

    changes: dict[str, Any] = {
        "flops_per_s": divided(machine.flops_per_s),
        "elements_per_s": divided(machine.elements_per_s),
    }
    if "train" in rates:
        changes |= {
            "parameters_per_s": machine.parameters_per_s / factor,
            "step_s": machine.step_s * factor,
            "eager_step_s": machine.eager_step_s * factor,
            "trained_block_s": machine.trained_block_s * factor,
        }
    if "forward" in rates:
        changes["forward_s"] = machine.forward_s * factor
    return replace(machine, **changes)
