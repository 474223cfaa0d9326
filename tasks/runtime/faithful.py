"""How faithful the runtime is to the simulation that was evaluated (`prefixquant bench FOLDER --text FILE`).

Letters: N windows, T tokens, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.tasks.export import load_quantized
from prefixquant.tasks.runtime.model import QuantizedCausalLM


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """What two computations of one model have in common."""

    same_argmax: float
    """Share of tokens whose most likely next token is the same."""

    ppl_simulation: float
    ppl_runtime: float
    tokens: int
    """Tokens compared."""

    def to_json(self) -> dict[str, float]:
        """Return it as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """Return it in a line."""
        change = self.ppl_runtime / self.ppl_simulation - 1
        return (
            f"same argmax on {self.same_argmax:.4%} of {self.tokens} tokens; perplexity {self.ppl_runtime:.4f} against "
            f"{self.ppl_simulation:.4f} in the simulation ({change:+.3%})"
        )


@torch.inference_mode()
def compare_with_simulation(
    folder: Path, windows_NT: Tensor, *, device: torch.device, dtype: torch.dtype
) -> Faithfulness:
    """Compare the runtime, in `dtype` between the products, with the simulation in the type it was exported in."""
    simulation = load_quantized(folder, device=device)
    runtime = QuantizedCausalLM.load(folder, device=device, dtype=dtype)
    same, tokens = 0, 0
    losses = torch.zeros(2, dtype=torch.float64, device=device)
    for window_T in windows_NT.to(device):
        logits = [model(input_ids=window_T.unsqueeze(0)).logits[0].float() for model in (simulation, runtime)]
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        tokens += len(window_T)
        for index, each_TV in enumerate(logits):
            losses[index] += F.cross_entropy(each_TV[:-1], window_T[1:], reduction="sum")
    mean = losses / (tokens - len(windows_NT))
    return Faithfulness(same / tokens, math.exp(mean[0]), math.exp(mean[1]), tokens)
