"""What kinds of machine reach: a small measured table (machines.json), by which work becomes seconds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from typing import Any

from prefixquant.tasks.errors import ConfigError

CPU = "cpu core"
"""The record of tasks that have no GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One CPU core, or one GPU with the core beside it, as the tasks of this package use it."""

    name: str

    matches: tuple[str, ...]
    """Parts of a GPU's name by which it is recognized."""

    measured: str
    """What the figures come from."""

    memory_bytes: float
    """Of the GPU; 0 on a CPU."""

    flops_per_s: Mapping[str, float]
    """Rate of matrix products by stage; `forward` by the type of the weights."""

    elements_per_s: Mapping[str, float]
    """Rate of what is done element by element beside the products. forward and train: channels (hidden plus
    intermediate) times tokens; search: weights times ratios tried."""

    parameters_per_s: float
    """Rate of the optimizer's update, gradients and fake quantization of weights included."""

    forward_s: float
    """Least time of a forward of a block: its launches."""

    step_s: float
    """Least time of a block in a training step."""

    eager_step_s: float
    """The same without a CUDA graph, as ranks of DeepSpeed step."""

    block_s: float
    """Of building a block from loaded weights."""

    trained_block_s: float
    """Of starting and ending the training of a block: its graph, its checkpoints, rounding."""

    task_s: float
    """Of any task."""

    worker_s: float
    """Of a new worker process. With several GPUs a node every task has one."""

    read_bytes_per_s: float
    """From store or checkpoint, verified, to the device."""

    write_bytes_per_s: float
    """To the store."""

    copy_bytes_per_s: float
    """Between pageable host memory and the GPU."""

    link_bytes_per_s: float
    """Between the ranks of a node, one way, while they compute."""

    process_bytes: float
    """Resident memory of a worker before it does anything."""

    seconds: Mapping[str, float]
    """Of the stages that do not depend on the model's size."""

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU that computes, not a CPU core."""
        return self.memory_bytes > 0

    def time(self, work: "Work") -> float:
        """Return the seconds that work takes here."""
        return (
            self.task_s
            + self.seconds.get(work.stage, 0.0)
            + self._compute(work)
            + work.read_bytes / self.read_bytes_per_s
            + work.written_bytes / self.write_bytes_per_s
        )

    def _compute(self, work: "Work") -> float:
        return (
            sum(amount / self.flops_per_s[kind] for kind, amount in work.flops.items())
            + sum(amount / self.elements_per_s[kind] for kind, amount in work.elements.items())
            + work.updates / self.parameters_per_s
            + work.forwards * self.forward_s
            + work.steps * self.step_s
            + work.eager_steps * self.eager_step_s
            + work.copied_bytes / self.copy_bytes_per_s
            + work.exchanged_bytes / self.link_bytes_per_s
            + work.blocks * self.block_s
            + work.trained_blocks * self.trained_block_s
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a task has to do, in units that do not depend on the machine."""

    stage: str

    flops: Mapping[str, float] = field(default_factory=dict)
    """Operations of matrix products, by the kind of rate they run at."""

    elements: Mapping[str, float] = field(default_factory=dict)
    """See `Machine.elements_per_s`."""

    updates: float = 0
    """Parameters updated, summed over the steps."""

    forwards: float = 0
    """Forwards of a block."""

    steps: float = 0
    """Blocks passed in training steps."""

    eager_steps: float = 0
    """The same, of ranks of DeepSpeed."""

    exchanged_bytes: float = 0
    """Sent by a rank to others and not hidden behind its products."""

    copied_bytes: float = 0
    """Of activations and weights, between host memory and the GPU."""

    blocks: float = 0
    """Blocks built."""

    trained_blocks: float = 0

    read_bytes: float = 0
    """From store and checkpoint."""

    written_bytes: float = 0
    """To the store."""


@cache
def machines() -> tuple[Machine, ...]:
    """Return the records of the table."""
    table = json.loads((resources.files("prefixquant.pipeline") / "machines.json").read_text(encoding="utf-8"))
    return tuple(parse_machine(record) for record in table)


def parse_machine(record: Mapping[str, Any]) -> Machine:
    """Return a record of the table. Raises ConfigError if it has not exactly the fields of `Machine`."""
    wanted = {each.name for each in fields(Machine)}
    if wanted != record.keys():
        raise ConfigError(f"machine {record.get('name')!r}: fields {sorted(wanted ^ record.keys())} are missing or new")
    return Machine(**{**record, "matches": tuple(record["matches"])})


def find_machine(name: str) -> Machine:
    """Return the record of a GPU, by what its driver calls it or by the name in the table; `cpu` is a core.

    Raises:
        ConfigError: the table has no such machine.
    """
    if name.lower() in ("cpu", CPU):
        name = CPU
    for machine in machines():
        if name == machine.name or any(part.lower() in name.lower() for part in machine.matches):
            return machine
    known = ", ".join(machine.name for machine in machines())
    raise ConfigError(
        f"no figures for a machine called {name!r}; known: {known}. Choose the nearest, or measure it with "
        f"`python -m prefixquant.pipeline.rehearse` and add a record to machines.json"
    )


def machine_of(gpu: tuple[str, int] | None) -> Machine:
    """Return the record of a GPU by its name and memory, or of a CPU core without one.

    Of a GPU that the table does not have, the memory is right and the rates are those of its last record.
    """
    if gpu is None:
        return find_machine(CPU)
    name, memory = gpu
    try:
        known = find_machine(name)
    except ConfigError:
        known = machines()[-1]
    return replace(known, memory_bytes=float(memory))


def local_machine() -> Machine:
    """Return the record of this machine's GPU, or of a CPU core."""
    import torch

    if not torch.cuda.is_available():
        return machine_of(None)
    properties = torch.cuda.get_device_properties(0)
    return machine_of((properties.name, properties.total_memory))
