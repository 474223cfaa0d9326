"""Predictions against what finished tasks took, by stage; and the rates of a machine that follow from it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from prefixquant.cluster.store import ArtifactMissing, ArtifactStore
from prefixquant.pipeline.estimates import Shape, estimate, work_of
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.machines import Machine, Work

FORWARD_STAGES = ("prefix", "calibrate", "stream", "evaluate")
"""Stages that do little else than pass tokens through blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a task took."""

    seconds: float
    host_bytes: int
    device_bytes: int
    device: str
    """Name of the GPU, or `cpu`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCheck:
    """One stage, predicted and measured."""

    stage: str
    tasks: int
    seconds: float
    """Sum over its tasks."""
    predicted_seconds: float
    host_bytes: int
    """Largest of its tasks."""
    predicted_host_bytes: int
    device_bytes: int
    predicted_device_bytes: int

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


def stored_measurements(graph: Graph, store: ArtifactStore) -> dict[str, Measured]:
    """Return what the manifests remember of the graph's nodes that have run; those yielded by others are left out."""
    found: dict[str, Measured] = {}
    for name in graph.order:
        try:
            meta = store.manifest(graph.key(name)).meta
        except ArtifactMissing:
            continue  # not run, or a stream that has served
        if "seconds" in meta:
            found[name] = Measured(
                seconds=meta["seconds"],
                host_bytes=meta["peak_host_bytes"],
                device_bytes=meta["peak_device_bytes"],
                device=meta["device"],
            )
    return found


def compare(graph: Graph, measured: Mapping[str, Measured], shape: Shape, machine: Machine) -> list[StageCheck]:
    """Return predictions beside measurements, a row a stage that has any, in order."""
    rows: dict[str, StageCheck] = {}
    for name in graph.order:
        if name not in measured:
            continue
        stage, cost, took = graph.nodes[name].task.name, estimate(graph.nodes[name], shape, machine), measured[name]
        row = rows.get(stage) or StageCheck(
            stage=stage,
            tasks=0,
            seconds=0.0,
            predicted_seconds=0.0,
            host_bytes=0,
            predicted_host_bytes=0,
            device_bytes=0,
            predicted_device_bytes=0,
        )
        rows[stage] = StageCheck(
            stage=stage,
            tasks=row.tasks + 1,
            seconds=row.seconds + took.seconds,
            predicted_seconds=row.predicted_seconds + cost.seconds,
            host_bytes=max(row.host_bytes, took.host_bytes),
            predicted_host_bytes=max(row.predicted_host_bytes, cost.host_bytes),
            device_bytes=max(row.device_bytes, took.device_bytes),
            predicted_device_bytes=max(row.predicted_device_bytes, cost.device_bytes),
        )
    return list(rows.values())


def table(rows: Iterable[StageCheck]) -> list[str]:
    """Return lines for people."""
    lines = [f"{'stage':<10} {'tasks':>5} {'s':>9} {'predicted':>9} {'ratio':>6} {'GB':>7} {'predicted':>9} {'ratio':>6}"]
    for row in rows:
        taken = (row.device_bytes, row.predicted_device_bytes)
        measured, predicted = taken if row.device_bytes else (row.host_bytes, row.predicted_host_bytes)
        lines.append(
            f"{row.stage:<10} {row.tasks:>5} {row.seconds:>9.2f} {row.predicted_seconds:>9.2f} {row.seconds_ratio:>6.2f} "
            f"{measured / 1e9:>7.2f} {predicted / 1e9:>9.2f} {row.memory_ratio:>6.2f}"
        )
    return lines


def fit(graph: Graph, measured: Mapping[str, Measured], shape: Shape, machine: Machine) -> Machine:
    """Return the machine with rates at which its predictions meet the measurements, stage by stage.

    Overheads and the rates of the store stay; what a stage took beyond them is shared in the proportions they have.
    A stage that took no longer than its overheads, or was not measured, changes nothing.
    """

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
            "trained_block_s": machine.trained_block_s * factor,
        }
    if "forward" in rates:
        changes["forward_s"] = machine.forward_s * factor
    return replace(machine, **changes)
