"""Ranks that train one module together: data parallel, with optimizer, gradients and parameters sharded by DeepSpeed.

Its classes satisfy the protocols of block training (Ranks, Stepper) by structure.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prefixquant.cluster.deepspeed_stepper import DeepSpeedStepper
from prefixquant.cluster.errors import RanksError
from prefixquant.cluster.process_group import process_group
from prefixquant.cluster.worker_group import Membership


@contextmanager
def join(
    member: Membership, device: torch.device, *, stage: int | None = None, parts: int = 1
) -> Iterator["DeepSpeedRanks"]:
    """Join the process group of a worker group and leave it at the end. It may be joined again after that.

    Args:
        member: this process's place in the group.
        device: where it computes: the first GPU it can see (each rank is given one), or the CPU. No compiler is needed.
        stage: ZeRO stage, 1 to 3; None: by the size of what is trained (`zero_stage`).
        parts: into how many parts, each with a forward of its own, this rank's share of a batch is cut to save memory.
    Raises:
        RanksError: a device or stage that cannot be.
    """
    if stage not in (None, 1, 2, 3):
        raise RanksError(f"the ZeRO stage must be 1, 2 or 3, got {stage}")
    environment = {"DS_ACCELERATOR": device.type}  # a rank without a GPU may still see those of its node
    with process_group(member, device, environment) as backend:
        deepspeed = _deepspeed(device)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        ranks = DeepSpeedRanks(member, device, stage, parts)
        try:
            yield ranks
        except BaseException:
            if backend == "gloo":  # tells the others at once; NCCL would wait for them here
                deepspeed.comm.destroy_process_group()
            raise
        ranks.close()
        deepspeed.comm.destroy_process_group()  # which forgets it as well


def zero_stage(num_parameters: int, ranks: int, device_bytes: int | None) -> int:
    """Return the lowest ZeRO stage, the fastest, whose tensors leave half of the device to activations.

    In float32 a trained parameter takes 4 bytes for itself, 4 for the gradient as backward makes it and 4 for a copy of
    it that the caller keeps of the best epoch; DeepSpeed adds a flat gradient (4), a master copy (4) and Adam's two
    moments (8), which it shards at every stage. Bytes a parameter on one of R ranks:

        stage 1: 12 + 16 / R     optimizer sharded
        stage 2:  8 + 20 / R     gradients as well
        stage 3:  4 + 24 / R     parameters as well

    A block of an 8B model (218 M parameters) on 2 ranks takes 4.4 GB at stage 1, one of a 70B model (856 M) 17 GB.

    Args:
        num_parameters: that are trained.
        ranks: how many share them; one has nothing to shard.
        device_bytes: memory of a rank's device; None: do not care.
    """
    if ranks == 1 or device_bytes is None:
        return 1
    for stage, (whole, sharded) in enumerate([(12, 16), (8, 20)], start=1):
        if num_parameters * (whole + sharded / ranks) <= device_bytes / 2:
            return stage
    return 3


class DeepSpeedRanks:
    """One of the processes that train together. Made by `join`."""

    compiles = False  # DeepSpeed hangs hooks and attributes on every module

    def __init__(self, member: Membership, device: torch.device, stage: int | None, parts: int) -> None:
        self._member, self._device, self._stage, self.parts = member, device, stage, parts
        self._stepper: DeepSpeedStepper | None = None

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return self._member.rank

    @property
    def size(self) -> int:
        """How many they are."""
        return self._member.size

    def stepper(
        self, module: nn.Module, groups: Sequence[Any], *, gradient_clip: float | None, precision: str
    ) -> DeepSpeedStepper:
        """Return what takes steps on `module(*batch)`, a scalar loss: the mean over this rank's share of a batch.

        Rank 0's parameters go to all. It ends the stepper made before, whose module then is an ordinary one again.

        Args:
            module: on the device; its trained parameters are float32.
            groups: of every parameter that requires a gradient; each has `parameters` and `weight_decay`.
            gradient_clip: largest norm of all gradients together, or None.
            precision: bf16, fp16 or fp32, the autocast type around the forward. fp16 scales the loss, and skips the
                update where a gradient overflows; which steps these are depends on the number of ranks.
        Raises:
            RanksError: what DeepSpeed would quietly do otherwise.
        """
        self.close()
        trained = sum(each.numel() for group in groups for each in group.parameters)
        memory = None if self._device.type == "cpu" else torch.cuda.get_device_properties(self._device).total_memory
        stage = self._stage or zero_stage(trained, self.size, memory)
        self._stepper = DeepSpeedStepper(module, groups, gradient_clip, precision, self._device, stage, self.parts)
        return self._stepper

    def mean(self, value: Tensor) -> Tensor:
        """Return a tensor averaged over the ranks."""
        total = value.detach().clone()
        torch.distributed.all_reduce(total)
        return total / self.size

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which every parameter of the module is whole on every rank and may be read or, if all
        ranks do the same, overwritten in place."""
        return nullcontext() if self._stepper is None else self._stepper.whole(module)

    def close(self) -> None:
        """End the stepper, if there is one: its parameters are whole and ordinary again. All ranks must call it."""
        if self._stepper is not None:
            stepper, self._stepper = self._stepper, None
            stepper.close()


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a kind of device, quietly and with nothing to compile."""
    fresh = "deepspeed" not in sys.modules
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
    if get_accelerator().device_name() != device.type:
        state = "chose" if fresh else "was imported before and chose"
        raise RanksError(f"DeepSpeed {state} {get_accelerator().device_name()} in this process; wanted {device.type}")
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled on first use; gloo does its work
    return deepspeed
