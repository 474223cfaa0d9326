"""Choose the few down_proj whose input stays in 16 bit, so that the prefix can be ordinary tokens.

A prefix token carries an input of down_proj hundreds of times the usual one in a few blocks. A static scale, made for
the tokens behind the prefix, clips it, and with it the attention sink that the prefix is there for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.tasks.model.block import run_batched
from prefixquant.tasks.model.sites import DOWN_INPUT
from prefixquant.tasks.profiles.simulate import BATCH_TOKENS, Simulation

TRIED = (0, 1, 2, 4, 8)
"""Numbers of exempt blocks whose perplexity is measured."""

TOLERANCE = 0.02
"""Fewer exemptions are taken if their perplexity is within this share of the best one's."""


@dataclass(frozen=True, slots=True)
class Exemptions:
    """Which blocks are exempt, and the evidence."""

    blocks: tuple[int, ...]
    """Blocks whose down_proj stays in 16 bit, the worst first."""

    ratios: tuple[float, ...]
    """By block: largest |down_proj input| of a prefix token over the median of the other tokens' largest ones."""

    perplexity: dict[int, float]
    """Number of exempt blocks, the worst ones, to perplexity over the windows given."""


def plan_exemptions(simulation: Simulation, ids_NT: Tensor) -> Exemptions:
    """Return the fewest exemptions, the worst blocks by max over median first, that do about as well as any tried.

    Args:
        simulation: of a profile with static scales whose prefix is ordinary tokens.
        ids_NT: windows of token ids on which ratios and perplexity are measured.
    """
    ratios = peak_ratios(simulation, ids_NT)
    ranked = sorted(range(len(ratios)), key=lambda block: -ratios[block])
    counts = sorted({min(count, len(ranked)) for count in TRIED})
    variants = [frozenset(ranked[:count]) for count in counts]
    hidden = simulation.hidden_variants(ids_NT, variants)
    measured = {count: simulation.perplexity(each, ids_NT) for count, each in zip(counts, hidden, strict=True)}
    best = min(measured.values())
    fewest = next(count for count in counts if measured[count] <= (1 + TOLERANCE) * best)
    return Exemptions(blocks=tuple(ranked[:fewest]), ratios=tuple(ratios), perplexity=measured)


def peak_ratios(simulation: Simulation, ids_NT: Tensor) -> list[float]:
    """Return `Exemptions.ratios`, measured with quantized weights and full-precision activations."""
    fed = simulation.with_prefix(ids_NT)
    num_prefix = fed.shape[1] - ids_NT.shape[1]
    stream = simulation.embedding[fed]
    batch = max(1, BATCH_TOKENS // fed.shape[1])
    ratios = []
    for block in simulation.blocks(quantize_inputs=False):
        found: list[Tensor] = []
        block.sites[DOWN_INPUT].observer = lambda x, found=found: found.append(x.abs().amax(-1).float().cpu())
        stream = run_batched(
            lambda x, block=block: block(x, None),  # type: ignore[misc]
            stream,
            batch,
            simulation.device,
            f"exemption planner, block {block.index}",
        )
        peaks = torch.cat(found)
        others = peaks[:, num_prefix:].median().clamp_min(torch.finfo(torch.float32).tiny)
        ratios.append(float(peaks[:, :num_prefix].max() / others))
    return ratios
