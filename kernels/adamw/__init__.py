"""One AdamW update of many tensors, and the norm of their gradients, in as few bytes as they take."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from prefixquant.kernels.dispatch import uses_triton
from prefixquant.kernels.errors import KernelInputError

from .reference import adamw_reference, total_norm_reference

__all__ = ["adamw_step", "total_norm"]


@torch.no_grad()
def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    *,
    rates: Sequence[Tensor],
    decays: Sequence[float],
    step: Tensor,
    divisor: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update parameters and moments in place (AdamW, arXiv:1711.05101, algorithm 2, with decay times rate).

    Nothing waits for the device, and what changes from step to step is read there: a CUDA graph may hold the call.

    Args:
        parameters: float32, contiguous.
        gradients: of the parameters' shapes, float32 or bfloat16.
        first_moments: of the gradient, like the parameters.
        second_moments: of the squared gradient, likewise.
        rates: learning rate of each parameter, float32 scalars on the device.
        decays: weight decay of each parameter.
        step: number of this update, from 1: a float32 scalar on the device.
        divisor: what gradients are divided by first, likewise; None: nothing.
        betas: decay of the moments.
        eps: added to the root of the second moment.

    Raises:
        KernelInputError: types, shapes, layouts or counts do not fit.
    """
    _check(parameters, gradients, first_moments, second_moments, rates, decays)
    # expm1 keeps what 1 - beta^t loses in float32 while beta^t is near 1
    corrections = -torch.expm1(step * math.log(betas[0])), -torch.expm1(step * math.log(betas[1]))
    update = adamw_reference
    if uses_triton(step):
        from .kernel import adamw_triton as update
    with _on_device(step):
        for parameter, gradient, first, second, rate, decay in zip(
            parameters, gradients, first_moments, second_moments, rates, decays, strict=True
        ):
            update(parameter, gradient, first, second, rate, decay, *corrections, divisor, betas, eps)


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all values together: a float32 scalar, summed in float32.

    Args:
        tensors: at least one, float32 or bfloat16, all on one device.

    Raises:
        KernelInputError: there is none, or one has another type.
    """
    if not tensors or any(each.dtype not in (torch.float32, torch.bfloat16) for each in tensors):
        kinds = ", ".join(sorted({str(each.dtype) for each in tensors})) or "no tensor"
        raise KernelInputError(f"total_norm needs float32 or bfloat16 tensors, got {kinds}")
    if uses_triton(tensors[0]):
        from .kernel import total_norm_triton

        with _on_device(tensors[0]):
            return total_norm_triton(tensors)
    return total_norm_reference(tensors)


def _check(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    rates: Sequence[Tensor],
    decays: Sequence[float],
) -> None:
    counts = [len(each) for each in (parameters, gradients, first_moments, second_moments, rates, decays)]
    if len(set(counts)) != 1:
        raise KernelInputError(f"adamw_step needs lists of equal length, got {', '.join(map(str, counts))}")
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if gradient.shape != parameter.shape or gradient.dtype not in (torch.float32, torch.bfloat16):
            raise KernelInputError(
                f"gradient {index} must be float32 or bfloat16 {tuple(parameter.shape)}, "
                f"got {gradient.dtype} {tuple(gradient.shape)}"
            )
        for name, each in (
            ("parameter", parameter),
            ("first moment", first_moments[index]),
            ("second moment", second_moments[index]),
        ):
            if each.dtype != torch.float32 or not each.is_contiguous() or each.shape != parameter.shape:
                raise KernelInputError(
                    f"{name} {index} must be contiguous float32 {tuple(parameter.shape)}, "
                    f"got {each.dtype} {tuple(each.shape)} with strides {each.stride()}"
                )


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
