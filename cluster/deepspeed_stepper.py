"""AdamW steps on a module whose training state DeepSpeed shards over the ranks (ZeRO, arXiv:1910.02054)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefixquant.cluster.errors import RanksError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


class DeepSpeedStepper:
    """Forward, backward, clipping and update on all ranks together. Made by `DeepSpeedRanks.stepper`."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Any],
        gradient_clip: float | None,
        precision: str,
        device: torch.device,
        stage: int,
        parts: int,
    ) -> None:
        import deepspeed

        self._names = {each: name for name, each in module.named_parameters() if each.requires_grad}
        _check(self._names, groups, gradient_clip, precision, device)
        self._module, self._device, self.stage, self._parts = module, device, stage, parts
        self._marks = _Marks(module)
        self._scalars = {each for each in module.parameters() if each.dim() == 0}
        for each in self._scalars:
            each.data = each.data.reshape(1)  # DeepSpeed cannot broadcast a tensor without dimensions
        self._hooks = _autocast(module, device, _AUTOCAST[precision])
        optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
            lr=0.0,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=device.type == "cuda",
        )
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only counts samples
            "gradient_clipping": (gradient_clip or 0.0) if stage == 3 else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000},  # elements: 200 MB
            "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it waits for the device
        }
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=list(self._names), config=config
        )
        if gradient_clip is not None and stage < 3:
            optimizer.register_step_pre_hook(partial(self._clip, gradient_clip))
        self._create_state(fused=device.type == "cuda")
        self._scale = _LossScale(self._zero) if precision == "fp16" else None

    def _create_state(self, fused: bool) -> None:
        """Give the optimizer the state that it would make at its first step: it may be read and set before."""
        flat = (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        for each in flat:
            step = torch.zeros((), device=each.device if fused else "cpu")
            moments = {name: torch.zeros_like(each, requires_grad=False) for name in _MOMENTS}
            self._zero.optimizer.state[each] = {"step": step} | moments
        if self.stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # links the parameters to their parts of it

    def _clip(self, most: float, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clip what the optimizer is about to take. DeepSpeed's own clipping asks the device once a parameter group."""
        excess = ((self._zero._global_grad_norm + 1e-6) / most).clamp_min(1.0)
        if self._device.type == "cuda":
            optimizer.grad_scale = excess  # type: ignore[attr-defined]  # the fused update divides by it
            return
        for group in optimizer.param_groups:
            for each in group["params"]:
                each.grad.div_(excess)

    def step(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on this rank's share of a batch.

        Returns the loss, averaged over the ranks, and the norm of the averaged gradient before clipping: float32
        scalars on the device. A gradient that is not finite leaves the parameters as they are, and the norm is
        infinite; except in fp16, where that is how the loss scale is found, the loss returned is NaN.
        """
        parts = list(zip(*(each.chunk(self._parts) for each in batch), strict=True))
        mean = torch.zeros((), device=self._device)
        for index, part in enumerate(parts):
            if len(parts) > 1:  # the update comes with the last part
                self._engine.set_gradient_accumulation_boundary(is_boundary=index + 1 == len(parts))
            loss = self._engine(*part) * (len(part[0]) / len(batch[0]))
            self._engine.backward(loss)
            self._engine.step()
            mean += loss.detach()
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._device)
        if self._scale is not None:
            self._scale.update(overflow=bool(self._zero.overflow))
        elif self._zero.overflow:
            mean.fill_(math.nan)
        return mean, norm

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each parameter group, for the steps that follow."""
        for group, rate in zip(self._zero.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole optimizer state, on the CPU and the same on every rank whatever their number.

        `NAME.exp_avg` and `NAME.exp_avg_sq` in float32 by the parameter's name in the module, and `step`. All ranks
        must call it. The loss scale of fp16 is no part of it.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {"step": next(iter(self._zero.optimizer.state.values()))["step"].detach().cpu().clone()}
        for parameter, name in self._names.items():
            for moment in _MOMENTS:
                value = safe_get_full_optimizer_state(parameter, moment).detach().cpu()
                state[f"{name}.{moment}"] = value.reshape(()) if parameter in self._scalars else value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, perhaps on another number of ranks."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        wanted = {"step"} | {f"{name}.{moment}" for name in self._names.values() for moment in _MOMENTS}
        if wanted != state.keys():
            raise RanksError(
                f"this optimizer state belongs to another module: {sorted(wanted ^ state.keys())[:4]} differ"
            )
        for each in self._zero.optimizer.state.values():
            each["step"].copy_(state["step"])
        for parameter, name in self._names.items():
            for moment in _MOMENTS:
                value = state[f"{name}.{moment}"].to(self._device)
                value = value.reshape(1) if parameter in self._scalars else value
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, _local(parameter, value), moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Have the module's parameters whole; what is written to them in place reaches the optimizer's copies."""
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        if self.stage < 3:
            with self._scalars_as_such():
                yield
            self._zero.refresh_fp32_params()
            return
        parameters = [each for each in module.parameters() if hasattr(each, "ds_id")]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            with self._scalars_as_such():
                yield
            for each in parameters:
                if each.requires_grad:
                    safe_set_local_fp32_param(each, _local(each, each.data))

    @contextmanager
    def _scalars_as_such(self) -> Iterator[None]:
        """Have the scalars without dimensions, as views."""
        for each in self._scalars:
            each.data = each.data.reshape(())
        yield
        for each in self._scalars:
            each.data = each.data.reshape(1)

    def close(self) -> None:
        """Make the module an ordinary one again, with whole parameters. All ranks must call it."""
        import deepspeed

        parameters = list(self._module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            values = [each.detach().clone() for each in parameters]  # of their own, not a part of flat buffers
        self._engine.destroy()
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        for hook in self._hooks:
            hook.remove()
        self._marks.remove(self._module)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.reshape(()) if parameter in self._scalars else value
            parameter.grad = None


class _LossScale:
    """Scales the loss as torch.amp.GradScaler does: halved at an overflow, doubled after 2000 steps without."""

    def __init__(self, zero: Any) -> None:
        self._zero, self._value, self._steady = zero, 65536.0, 0
        zero.override_loss_scale(self._value)

    def update(self, overflow: bool) -> None:
        self._steady = 0 if overflow else self._steady + 1
        if overflow:
            self._value /= 2
        elif self._steady == 2000:
            self._value, self._steady = self._value * 2, 0
        self._zero.override_loss_scale(self._value)


class _Marks:
    """Remembers what a module's objects look like, to take off them what DeepSpeed hangs on and leaves there."""

    def __init__(self, module: nn.Module) -> None:
        objects: list[Any] = [*module.modules(), *module.parameters()]
        self._before = {each: set(vars(each)) for each in objects}

    def remove(self, module: nn.Module) -> None:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        FWD_MODULE_STACK[:] = [each for each in FWD_MODULE_STACK if each is not module]  # it would live for ever
        for each, names in self._before.items():
            if hasattr(each, "_original_parameters"):
                each._parameters = each._original_parameters
            for name in vars(each).keys() - names:
                delattr(each, name)


def _autocast(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> list[Any]:
    """Put autocast into the module's forward; around it, DeepSpeed would switch it off."""
    if dtype is None:
        return []
    entered: list[torch.autocast] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(torch.autocast(device.type, dtype=dtype))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _local(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a parameter's whole value at stage 3; zeros fill up the last one."""
    size = parameter.ds_tensor.numel()
    part = value.flatten()[size * torch.distributed.get_rank() :][:size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _check(
    names: Mapping[nn.Parameter, str],
    groups: Sequence[Any],
    gradient_clip: float | None,
    precision: str,
    device: torch.device,
) -> None:
    if precision not in _AUTOCAST:
        raise RanksError(f"precision must be one of {', '.join(_AUTOCAST)}, got {precision!r}")
    if gradient_clip is not None and gradient_clip <= 0:
        raise RanksError(f"gradient_clip must be above 0, or None for no clipping, got {gradient_clip}")
    grouped = [each for group in groups for each in group.parameters]
    if any(not list(group.parameters) for group in groups):
        raise RanksError("a parameter group is empty; DeepSpeed would drop it and shift the learning rates")
    if len(grouped) != len(names) or {id(each) for each in grouped} != {id(each) for each in names}:
        loose = [name for each, name in names.items() if all(each is not other for other in grouped)]
        raise RanksError(
            f"the groups must hold each parameter that requires a gradient once, got {len(grouped)} for {len(names)}; "
            f"in no group: {', '.join(loose[:4]) or 'none'}"
        )
    for parameter, name in names.items():
        if parameter.dtype != torch.float32 or parameter.device.type != device.type:
            raise RanksError(f"{name} must be float32 on {device}, got {parameter.dtype} on {parameter.device}")
