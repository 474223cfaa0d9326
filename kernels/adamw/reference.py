"""AdamW and the norm of gradients in plain PyTorch: the truth, and the path on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_reference(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rate: Tensor,
    decay: float,
    correction1: Tensor,
    correction2: Tensor,
    divisor: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update one parameter and its moments in place; the corrections are 1 - beta^t."""
    gradient = gradient.float()
    if divisor is not None:
        gradient = gradient / divisor
    first.lerp_(gradient, 1 - betas[0])
    second.lerp_(gradient.square(), 1 - betas[1])
    if decay:
        parameter.mul_(1 - rate * decay)
    root = (second / correction2).sqrt_().add_(eps)
    parameter.sub_((first / root).mul_(rate / correction1))


def total_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all values together."""
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
