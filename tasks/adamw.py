"""AdamW as one process runs it: rates, step count and clipping live on the device, so that a CUDA graph may hold it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prefixquant.kernels.adamw import adamw_step
from prefixquant.tasks.parallel import ParameterGroup

BETAS = (0.9, 0.999)
EPS = 1e-8


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) on float32 parameters whose gradients are float32 or bfloat16."""

    def __init__(self, groups: Sequence[ParameterGroup], device: torch.device) -> None:
        """Start with zero moments, zero rates and no step taken."""
        super().__init__([{"params": each.parameters, "weight_decay": each.weight_decay} for each in groups], {})
        self.rates = torch.zeros(len(groups), device=device)
        """Learning rate of each group."""
        self.count = torch.zeros((), device=device)
        """Steps taken."""
        self.divisor: Tensor | None = None
        """What the next step divides gradients by as it reads them: a float32 scalar, or None."""
        self.parameters = [parameter for each in groups for parameter in each.parameters]
        self.first_moments = [torch.zeros_like(each, requires_grad=False) for each in self.parameters]
        self.second_moments = [torch.zeros_like(each, requires_grad=False) for each in self.parameters]
        self._decays = [each.weight_decay for each in groups for _ in each.parameters]
        self._groups = [index for index, each in enumerate(groups) for _ in each.parameters]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter by its gradient."""
        assert closure is None, "a step is taken on gradients that are there"
        self.count += 1
        self._update(self.parameters, self._gradients(), self.first_moments, self.second_moments)

    @torch.no_grad()
    def rehearse(self) -> None:
        """Launch what a step launches, on pieces of copies: recording a CUDA graph must not be the first to do so."""
        tensors = (self.parameters, self._gradients(), self.first_moments, self.second_moments)
        self._update(*([_piece(each) for each in kind] for kind in tensors))

    def _gradients(self) -> list[Tensor]:
        found = [each.grad for each in self.parameters if each.grad is not None]
        assert len(found) == len(self.parameters), "a step needs the gradient of every parameter"
        return found

    def _update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first_moments: Sequence[Tensor],
        second_moments: Sequence[Tensor],
    ) -> None:
        adamw_step(
            parameters,
            gradients,
            first_moments,
            second_moments,
            rates=[self.rates[index] for index in self._groups],
            decays=self._decays,
            step=self.count,
            divisor=self.divisor,
            betas=BETAS,
            eps=EPS,
        )


def _piece(x: Tensor) -> Tensor:
    """Return a copy of the first values; kernels are compiled anew where the size is no multiple of 16."""
    return x.detach().flatten()[: 4096 + x.numel() % 16].clone()
