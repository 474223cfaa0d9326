"""Distances between a block's output and its target. Each depends on one sequence at a time, so that splitting a batch
over ranks changes nothing. Letters: B sequences, T tokens, D hidden."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefixquant.tasks.rotate import Ends

SKIPPED_TOKENS = 3
"""Tokens of a sequence that `skip_mse` leaves out (the original's choice for Llama-2-70B)."""

CLAMP_RATIO = 10.0
"""Times the median token's error at which `clamp_mse` caps the error of a token."""


def _token_errors(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean squared error of every token [B, T], in float32."""
    return (output_BTD.float() - target_BTD.float()).square().mean(-1)


def mse(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(output_BTD.float(), target_BTD.float())


def clamp_mse(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean squared error with each token's capped at `CLAMP_RATIO` times the median of its sequence."""
    errors = _token_errors(output_BTD, target_BTD)
    cap = CLAMP_RATIO * errors.detach().median(-1, keepdim=True).values
    return errors.minimum(cap).mean()


def skip_mse(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean squared error without the `SKIPPED_TOKENS` tokens of each sequence that err most."""
    errors = _token_errors(output_BTD, target_BTD)
    kept = max(1, errors.shape[1] - SKIPPED_TOKENS)
    return errors.topk(kept, dim=-1, largest=False).values.mean()


def normalized_mse(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean over tokens of the squared error over the squared norm of the target."""
    error = (output_BTD.float() - target_BTD.float()).square().sum(-1)
    return (error / target_BTD.float().square().sum(-1).clamp_min(1e-12)).mean()


def cosine(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean over tokens of 1 - cos(output, target)."""
    return (1 - F.cosine_similarity(output_BTD.float(), target_BTD.float(), dim=-1)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "clamp_mse": clamp_mse,
    "skip_mse": skip_mse,
    "normalized_mse": normalized_mse,
    "cosine": cosine,
}


class LogitLoss:
    """Kullback-Leibler divergence of the model's next-token distribution, from the hidden states after its last block.

    Tokens go through the head in chunks whose logits are computed again in the backward: [B, T, vocabulary] in float32
    would be the largest tensor of the run.
    """

    def __init__(self, ends: Ends, eps: float, device: torch.device, chunk_tokens: int = 1024) -> None:
        self.gain, self.head = ends.gain.to(device), ends.head.to(device)
        self.eps, self.chunk = eps, chunk_tokens

    def __call__(self, output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Return the mean over tokens of KL(target || output), in nats."""
        outputs, targets = output_BTD.flatten(0, 1), target_BTD.flatten(0, 1)
        total = outputs.new_zeros((), dtype=torch.float32)
        for output, target in zip(outputs.split(self.chunk), targets.split(self.chunk), strict=True):
            total = total + checkpoint(self._divergence, output, target, use_reentrant=False, preserve_rng_state=False)
        return total / len(outputs)

    def _divergence(self, output_TD: Tensor, target_TD: Tensor) -> Tensor:
        wanted = self._log_probabilities(target_TD)
        found = self._log_probabilities(output_TD)
        return F.kl_div(found, wanted, reduction="sum", log_target=True)

    def _log_probabilities(self, hidden_TD: Tensor) -> Tensor:
        x = hidden_TD.float()
        x = self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(self.gain.dtype)
        return F.log_softmax((x @ self.head.T).float(), dim=-1)
