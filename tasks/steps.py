"""Training on a single process: AdamW steps, on a GPU as one CUDA graph."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from prefixquant.kernels.adamw import total_norm
from prefixquant.tasks.adamw import AdamW
from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.parallel import ParameterGroup

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
_WARM_UP_STEPS = 3


class SingleRank:
    """The only process that trains."""

    rank = 0
    size = 1
    compiles = True

    def __init__(self, *, cuda_graph: bool = True, parts: int = 1) -> None:
        """With `cuda_graph`, steps on a GPU are recorded once and replayed, except in fp16.

        The module's forward then must not wait for the device, nor decide anything by the value of a tensor. A batch
        passes in `parts`, one after the other; that changes a step by the order of floating-point sums alone.
        """
        self._cuda_graph, self.parts = cuda_graph, parts

    def stepper(
        self, module: nn.Module, groups: Sequence[ParameterGroup], *, gradient_clip: float | None, precision: str
    ) -> "SingleStepper":
        """Return what takes steps on `module(*batch)`, a scalar loss: the mean over the batch it is given.

        `groups` holds every parameter of the module that requires a gradient. `precision`: bf16, fp16 or fp32, the
        autocast type around the forward. `gradient_clip`: largest norm of all gradients together, or None.
        """
        return SingleStepper(module, groups, gradient_clip, precision, self._cuda_graph, self.parts)

    def mean(self, value: Tensor) -> Tensor:
        """Return the tensor."""
        return value

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context that has nothing to do."""
        return nullcontext()


class AdamWStepper:
    """AdamW steps on tensors whose gradients a subclass works out, on a GPU recorded as one CUDA graph."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        groups: Sequence[ParameterGroup],
        gradient_clip: float | None,
        precision: str,
        *,
        cuda_graph: bool,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Prepare steps on leaf tensors by name, in groups; `scaler` for fp16 alone."""
        self._tensors = dict(tensors)
        self._gradient_clip, self._dtype, self._scaler = gradient_clip, _AUTOCAST[precision], scaler
        self._device = next(iter(self._tensors.values())).device
        # The loss scale of fp16 is for the host to decide.
        self._graphed = cuda_graph and self._device.type == "cuda" and precision != "fp16"
        if scaler is None:
            for each in self._tensors.values():  # a gradient may keep the type of the product that made it
                each.grad_dtype = None
        self._optimizer = AdamW(groups, self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, ...] = ()
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Told what comes next while a step is recorded; a step that is stuck has begun that and not ended it."""
        self._result: tuple[Tensor, Tensor] = (self._optimizer.count, self._optimizer.count)

    def step(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step.

        Returns the loss and the norm of the gradient before clipping: float32 scalars on the device, valid until the
        next step. Nothing waits for the device. fp16 skips the update where the gradient overflows.
        """
        if not self._graphed:
            return self._eager_step(*batch)
        if self._graph is None:
            self._record(batch)
        assert self._graph is not None
        if [each.shape for each in batch] != [each.shape for each in self._batch]:
            return self._eager_step(*batch)  # it works on the same parameters, gradients and state
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result

    def _eager_step(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        loss, norm = self._gradients(*batch)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return loss, norm

    def _gradients(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Put the clipped gradient of a batch in place; return the loss and the norm before clipping."""
        raise NotImplementedError

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None)

    def _fill(self) -> list[Tensor]:
        """Return all gradients, zero where a tensor had no part in the loss."""
        for each in self._tensors.values():
            if each.grad is None:
                each.grad = torch.zeros_like(each, requires_grad=False)
        return [each.grad for each in self._tensors.values() if each.grad is not None]

    def _clip(self, norm: Tensor) -> None:
        """Have the update take gradients of this norm clipped: it divides as it reads them, which saves a pass."""
        if self._gradient_clip is not None:
            self._optimizer.divisor = ((norm + 1e-6) / self._gradient_clip).clamp_min(1.0)

    def _record(self, batch: Sequence[Tensor]) -> None:
        """Record a step as a CUDA graph, without taking one: warming up stops short of the update."""
        self._batch = tuple(each.to(self._device, copy=True) for each in batch)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for number in range(_WARM_UP_STEPS):
                self.on_phase(f"warm-up step {number + 1} of {_WARM_UP_STEPS}" + (", compiling" if not number else ""))
                self._gradients(*self._batch)
            self._optimizer.rehearse()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self.on_phase("end of the warm-up")
        torch.cuda.synchronize(self._device)
        self.on_phase("capture")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads watch NCCL, or pin memory
            self._result = self._eager_step(*self._batch)
        self._graph = graph
        self.on_phase("first replay")

    def forget_graph(self) -> None:
        """Drop the recorded step, if there is one; the next step records anew."""
        if self._graph is not None:
            torch.cuda.synchronize(self._device)
            self._graph.reset()
            self._graph, self._batch = None, ()

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each parameter group, for the steps that follow."""
        given = torch.tensor(rates, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        self._optimizer.rates.copy_(given, non_blocking=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole optimizer state, on the CPU.

        `NAME.exp_avg` and `NAME.exp_avg_sq` in float32 by the parameter's name in the module, and `step`. The loss
        scale of fp16 is no part of it.
        """
        whole = {f"{name}.{moment}": self._whole_of(name, own) for name, moment, own in self._moments()}
        return {"step": self._optimizer.count.cpu().clone()} | whole

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, perhaps on another number of ranks."""
        moments = self._moments()
        wanted = {"step"} | {f"{name}.{moment}" for name, moment, _ in moments}
        if wanted != state.keys():
            names = ", ".join(sorted(wanted ^ state.keys())[:4])
            raise CheckpointError(f"this optimizer state belongs to another module: {names} differ")
        self._optimizer.count.copy_(state["step"])
        for name, moment, own in moments:
            own.copy_(self._part_of(name, state[f"{name}.{moment}"]))

    def _moments(self) -> list[tuple[str, str, Tensor]]:
        """Return the optimizer's moments with the name of their tensor and their own."""
        optimizer, names = self._optimizer, {each: name for name, each in self._tensors.items()}
        found = []
        for each, first, second in zip(
            optimizer.parameters, optimizer.first_moments, optimizer.second_moments, strict=True
        ):
            found += [(names[each], "exp_avg", first), (names[each], "exp_avg_sq", second)]
        return found

    def _whole_of(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU of what the ranks together hold of a tensor's moment."""
        return tensor.detach().cpu().clone()

    def _part_of(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of a tensor's moment."""
        return tensor


class SingleStepper(AdamWStepper):
    """Forward, backward, clipping and update. Made by `SingleRank.stepper`."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        gradient_clip: float | None,
        precision: str,
        cuda_graph: bool,
        parts: int,
    ) -> None:
        names = {name: each for name, each in module.named_parameters() if each.requires_grad}
        check_groups(names, groups, gradient_clip, precision)
        self._module, self._parts = module, parts
        device = next(iter(names.values())).device
        super().__init__(
            names,
            groups,
            gradient_clip,
            precision,
            cuda_graph=cuda_graph,
            scaler=torch.amp.GradScaler(device.type) if precision == "fp16" else None,
        )

    def _gradients(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        self._optimizer.zero_grad(set_to_none=True)  # the backward then writes the gradients instead of adding to zeros
        total = torch.zeros((), device=self._device)
        for part in zip(*(each.chunk(self._parts) for each in batch), strict=True):
            with self._autocast():
                loss: Tensor = self._module(*part) * (len(part[0]) / len(batch[0]))
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            total += loss.detach()
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        norm = total_norm(self._fill())
        self._clip(norm)
        return total, norm


def check_groups(
    names: Mapping[str, Tensor], groups: Sequence[ParameterGroup], gradient_clip: float | None, precision: str
) -> None:
    """Raise ConfigError for a precision or clipping norm that cannot be."""
    if precision not in _AUTOCAST:
        raise ConfigError(f"train.precision must be one of {', '.join(_AUTOCAST)}, got {precision!r}")
    if gradient_clip is not None and gradient_clip <= 0:
        raise ConfigError(f"train.gradient_clip must be above 0, or null for no clipping, got {gradient_clip}")
    grouped = [id(each) for group in groups for each in group.parameters]
    assert sorted(grouped) == sorted(id(each) for each in names.values()), "groups hold each trained parameter once"
    assert all(each.dtype == torch.float32 for each in names.values()), "trained parameters are float32"
