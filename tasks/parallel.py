"""What training asks of the ranks it runs on: one process (`steps`), several that own rows of the weights
(`sharded_steps`), or DeepSpeed's (`cluster.deepspeed_ranks`)."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[Tensor]
    weight_decay: float = 0.0


class Stepper(Protocol):
    """Takes AdamW steps on the loss that a module returns: forward, backward, clipping, update."""

    def step(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on this rank's share of a batch.

        Returns the loss, averaged over the ranks, and the norm of the averaged gradient before clipping: float32
        scalars on the device, valid until the next step. Nothing waits for the device.
        """

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each parameter group, for the steps that follow."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole optimizer state, on the CPU and the same on every rank whatever their number.

        `NAME.exp_avg` and `NAME.exp_avg_sq` in float32 by the parameter's name in the module, and `step`. All ranks
        must call it.
        """

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, perhaps on another number of ranks."""


class Ranks(Protocol):
    """The processes that train together, each on its share of every batch."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def size(self) -> int:
        """How many they are."""

    @property
    def compiles(self) -> bool:
        """Whether the modules that it steps may go through torch.compile."""

    @property
    def parts(self) -> int:
        """Into how many parts, each with a forward of its own, a rank's share of a batch is cut to save memory."""

    def stepper(
        self, module: nn.Module, groups: Sequence[ParameterGroup], *, gradient_clip: float | None, precision: str
    ) -> Stepper:
        """Return what takes steps on `module(*batch)`, a scalar loss: the mean over the batch it is given.

        `groups` holds every parameter of the module that requires a gradient. `precision`: bf16, fp16 or fp32, the
        autocast type around the forward. `gradient_clip`: largest norm of all gradients together, or None.
        """

    def mean(self, value: Tensor) -> Tensor:
        """Return a tensor averaged over the ranks."""

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which every parameter of the module is whole on every rank and may be read or, if all
        ranks do the same, overwritten in place."""
