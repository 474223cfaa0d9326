"""Training on a single process: AdamW steps, on a GPU as one CUDA graph."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.parallel import ParameterGroup

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WARM_UP_STEPS = 3


class SingleRank:
    """The only process that trains."""

    rank = 0
    size = 1

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


class SingleStepper:
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
        self._names = {each: name for name, each in module.named_parameters() if each.requires_grad}
        _check(self._names, groups, gradient_clip, precision)
        self._module, self._gradient_clip, self._dtype = module, gradient_clip, _AUTOCAST[precision]
        self._parts = parts
        self._parameters = list(self._names)
        self._device = self._parameters[0].device
        on_gpu = self._device.type == "cuda"
        self._graphed = cuda_graph and on_gpu and precision != "fp16"  # the loss scale is for the host to decide
        self._scaler = torch.amp.GradScaler(self._device.type) if precision == "fp16" else None
        self._fused = on_gpu and precision != "fp16"  # whose scaler uses the same place
        self._rates = torch.zeros(len(groups), device=self._device)
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": group.parameters,
                    "weight_decay": group.weight_decay,
                    "lr": self._rates[index] if on_gpu else 0.0,  # on the device, where a graph reads it
                }
                for index, group in enumerate(groups)
            ],
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=on_gpu,
            capturable=self._graphed,
        )
        for each in self._parameters:
            step = torch.zeros((), device=self._device if on_gpu else "cpu")
            moments = {name: torch.zeros_like(each, requires_grad=False) for name in _MOMENTS}
            self._optimizer.state[each] = {"step": step} | moments
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, ...] = ()
        self._result: tuple[Tensor, Tensor] = (self._rates, self._rates)

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
        self._optimizer.zero_grad(set_to_none=True)  # the backward then writes the gradients instead of adding to zeros
        total = torch.zeros((), device=self._device)
        for part in zip(*(each.chunk(self._parts) for each in batch), strict=True):
            with torch.autocast(self._device.type, self._dtype or torch.bfloat16, enabled=self._dtype is not None):
                loss: Tensor = self._module(*part) * (len(part[0]) / len(batch[0]))
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            total += loss.detach()
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        for each in self._parameters:
            if each.grad is None:  # no part in the loss
                each.grad = torch.zeros_like(each, requires_grad=False)
        norm = nn.utils.get_total_norm([each.grad for each in self._parameters if each.grad is not None])
        if self._gradient_clip is not None and self._fused:
            # The fused update divides by it as it reads the gradient, which saves a pass over all of them.
            self._optimizer.grad_scale = (norm / self._gradient_clip).clamp_min(1.0)  # type: ignore[attr-defined]
        elif self._gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._gradient_clip, norm)
        return total, norm

    def _record(self, batch: Sequence[Tensor]) -> None:
        """Record a step as a CUDA graph, without taking one: warming up stops short of the update."""
        self._batch = tuple(each.to(self._device, copy=True) for each in batch)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._gradients(*self._batch)
            _load_update_kernels(self._device)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._eager_step(*self._batch)
        self._graph = graph

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each parameter group, for the steps that follow."""
        if self._device.type == "cuda":
            self._rates.copy_(torch.tensor(rates, dtype=torch.float32, pin_memory=True), non_blocking=True)
            return
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole optimizer state, on the CPU.

        `NAME.exp_avg` and `NAME.exp_avg_sq` in float32 by the parameter's name in the module, and `step`. The loss
        scale of fp16 is no part of it.
        """
        state = {"step": self._optimizer.state[self._parameters[0]]["step"].detach().cpu().clone()}
        for each, name in self._names.items():
            for moment in _MOMENTS:
                state[f"{name}.{moment}"] = self._optimizer.state[each][moment].detach().cpu().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, perhaps on several ranks."""
        wanted = {"step"} | {f"{name}.{moment}" for name in self._names.values() for moment in _MOMENTS}
        if wanted != state.keys():
            names = ", ".join(sorted(wanted ^ state.keys())[:4])
            raise CheckpointError(f"this optimizer state belongs to another module: {names} differ")
        for each, name in self._names.items():
            own = self._optimizer.state[each]
            own["step"].copy_(state["step"])
            for moment in _MOMENTS:
                own[moment].copy_(state[f"{name}.{moment}"])


def _load_update_kernels(device: torch.device) -> None:
    """Have AdamW's kernels loaded, which must not happen while a graph is recorded, on a parameter of no one."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter, requires_grad=False)
    torch.optim.AdamW([parameter], lr=torch.zeros((), device=device), fused=True, capturable=True).step()


def _check(
    names: Mapping[nn.Parameter, str], groups: Sequence[ParameterGroup], gradient_clip: float | None, precision: str
) -> None:
    if precision not in _AUTOCAST:
        raise ConfigError(f"train.precision must be one of {', '.join(_AUTOCAST)}, got {precision!r}")
    if gradient_clip is not None and gradient_clip <= 0:
        raise ConfigError(f"train.gradient_clip must be above 0, or null for no clipping, got {gradient_clip}")
    grouped = [id(each) for group in groups for each in group.parameters]
    assert sorted(grouped) == sorted(id(each) for each in names), "groups must hold each trained parameter once"
    assert all(each.dtype == torch.float32 for each in names), "trained parameters are float32"
