"""What a run tells while it is under way, and what became of its nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import OutOfMemoryError

from prefixquant.cluster.errors import (
    ArtifactCorrupted,
    ArtifactMissing,
    ResourceError,
    StoreUnavailable,
    StoreUnreadable,
    StoreUnwritable,
)
from prefixquant.cluster.ray_session import TaskLostError
from prefixquant.pipeline.worker import NodeResult
from prefixquant.tasks.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericalError,
    PrefixQuantError,
    UnsupportedModelError,
)

_SHOWN_FAILURES = 3

_ADVICE: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (ConfigError, "Correct the recipe and run again; what is finished is stored."),
    (DataError, "Correct the texts that the recipe names and run again; what is finished is stored."),
    ((CheckpointError, UnsupportedModelError), "Correct the model's files and run again; what is finished is stored."),
    (NumericalError, "The numbers diverged: lower the learning rate, or look at what enters that block."),
    (ResourceError, "Ask for fewer processes with --ranks, or use a larger cluster, and run again to go on from here."),
    (StoreUnavailable, "The store did not answer for long. Run again to go on from here."),
    (StoreUnreadable, "Renew credentials or permissions of the store, then run again; what is finished is stored."),
    (StoreUnwritable, "Make room or choose another store, then run again; what is finished is stored."),
    (
        (ArtifactCorrupted, ArtifactMissing),
        "Its input is damaged or gone each time it is built: check the disk, and whether another run uses the store.",
    ),
    (
        (MemoryError, OutOfMemoryError),
        "Too little memory: lower the batch or calibration size of that task, or use a larger machine.",
    ),
    (TaskLostError, "The worker died each time, mostly for lack of memory. Run again to go on from here."),
)
_INPUT_ERRORS = (ConfigError, DataError, CheckpointError, UnsupportedModelError)
_DEFAULT_ADVICE = "Run again to go on from here; what is finished is stored."


class RunFailedError(PrefixQuantError):
    """A task failed or the run was interrupted; what is finished is stored."""

    def __init__(self, message: str, *, interrupted: bool = False, input_is_wrong: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted
        self.input_is_wrong = input_is_wrong


def exit_status(err: Exception) -> int:
    """Return 1 where the same command can do it another time, 2 where what was given has to be changed first."""
    if isinstance(err, StoreUnavailable):
        return 1
    return 1 if isinstance(err, RunFailedError) and not err.input_is_wrong else 2


Outcome = Literal["done", "cached", "failed", "skipped", "unneeded"]
"""done: built in this run. cached: was there. failed: its task raised. skipped: needs one that failed, or the run was
interrupted first. unneeded: nothing that ran had a use for it."""


EventKind = Literal["submitted", "progress", "done", "cached", "failed", "skipped", "repaired", "reduced", "discarded"]
"""progress: its task says how far it is. repaired: an input of the node was damaged and is built again first.
reduced: the GPU's memory did not suffice and the node runs again with half as much in a forward.
discarded: the node's ephemeral artifact has served and is gone from the store. The others: see Outcome."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a node."""

    kind: EventKind

    node: str
    task: str
    seconds: float
    """Since the run began."""

    result: NodeResult | None = None
    """With `done`, unless another node's run yielded the artifact."""

    message: str = ""
    """With `failed`, `repaired` and `reduced`: why. With `progress`: where the task is, in a few words."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """With `progress`: numbers for tracking."""

    step: int = 0
    """With `progress`: of the metrics."""


@dataclass(frozen=True, slots=True)
class NodeFailure:
    """Why a node came to no artifact."""

    node: str
    key: str
    error: str
    """Kind and message, one line as a rule."""

    advice: str
    """What to do next."""

    detail: str
    """The worker's traceback, where there is one."""

    input_is_wrong: bool = False
    """Whether the user's recipe, model or text is at fault, not the run."""

    @classmethod
    def of(cls, node: str, key: str, err: Exception) -> "NodeFailure":
        """Return the failure of a node by what its task raised."""
        return cls(
            node=node,
            key=key,
            error=f"{type(err).__name__}: {str(err).strip() or 'no message'}",
            advice=next((advice for kinds, advice in _ADVICE if isinstance(err, kinds)), _DEFAULT_ADVICE),
            detail=str(err.__cause__ or ""),
            input_is_wrong=isinstance(err, _INPUT_ERRORS),
        )

    def __str__(self) -> str:
        return f"{self.node} failed (artifact {self.key[:12]}): {self.error}\n{self.advice}"


@dataclass(frozen=True, slots=True)
class RunResult:
    """What became of every node."""

    states: dict[str, Outcome]
    results: dict[str, NodeResult]
    """Of the nodes that ran, which excludes byproducts."""

    failures: list[NodeFailure]
    seconds: float
    """Wall clock of the run."""

    interrupted: bool
    """A SIGINT or SIGTERM ended it early."""

    @property
    def ok(self) -> bool:
        """Whether all targets are there."""
        return not self.failures and not self.interrupted

    def require(self) -> None:
        """Raise RunFailedError if something failed or the run was interrupted."""
        if self.interrupted:
            message = "interrupted; finished tasks are stored, and the same command goes on from them"
            raise RunFailedError(message, interrupted=True)
        if self.failures:
            shown = [str(failure) for failure in self.failures[:_SHOWN_FAILURES]]
            more = len(self.failures) - len(shown)
            message = "\n".join([*shown, *([f"and {more} more tasks failed"] if more else [])])
            raise RunFailedError(message, input_is_wrong=all(failure.input_is_wrong for failure in self.failures))
