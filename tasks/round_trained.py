"""Round the weights of a trained block by GPTQ, on the trained grids and alike on every rank (see `gptq`).

Letters: S steps, R ranks, P sequences of a rank in a step, T tokens, D hidden.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from prefixquant.tasks.gptq import GptqConfig, gptq_block
from prefixquant.tasks.model.block import Block, Prefix
from prefixquant.tasks.model.quantizer import QuantizedWeight
from prefixquant.tasks.model.spec import WeightSpec
from prefixquant.tasks.parallel import Ranks
from prefixquant.tasks.search import block_output
from prefixquant.tasks.streams import Stream

GPTQ_SEQUENCES = 32
"""Most training sequences that the Gram matrices are taken from: the first ones."""


def round_trained(
    block: Block,
    inputs: Stream,
    prefix: Prefix | None,
    trained: Mapping[str, Tensor],
    nearest: Mapping[str, QuantizedWeight],
    spec: WeightSpec,
    config: GptqConfig,
    ranks: Ranks,
    *,
    batch_size: int,
    forward_size: int,
) -> dict[str, QuantizedWeight]:
    """Return the trained weights on their grids; the block, which is as the runtime would run it, is left with them.

    Args:
        block: with the trained weights rounded to nearest.
        inputs: this rank's share of the quantized stream that enters the block in training.
        prefix: keys and values of the prefix in this block.
        trained: weights before rounding, by linear.
        nearest: rounded to nearest; their grids are kept.
        spec: how weights are quantized.
        config: how to round.
        ranks: the processes that train together.
        batch_size: sequences of an optimizer step, over all ranks together.
        forward_size: sequences of a forward.

    Raises:
        NumericalError: as `gptq_block` does.
    """
    sequences_NTD = first_sequences(inputs, batch_size, ranks)
    rounded = gptq_block(
        block, lambda: block_output(block, sequences_NTD, prefix, forward_size), trained, nearest, spec, config
    )
    if ranks.size > 1:
        rounded = {role: _of_first_rank(weight, ranks) for role, weight in rounded.items()}
        for role, weight in rounded.items():
            linear = block.linear(role)
            linear.weight.data = weight.dequantize(spec).to(linear.weight.dtype)
    return rounded


def first_sequences(inputs: Stream, batch_size: int, ranks: Ranks) -> Tensor:
    """Return the first `GPTQ_SEQUENCES` of all ranks' sequences [N, T, D], in the order of a single rank."""
    per_rank = batch_size // ranks.size
    steps = -(-GPTQ_SEQUENCES // batch_size)
    own_SPTD = inputs.part(0, steps * per_rank).unflatten(0, (-1, per_rank))
    if ranks.size == 1:
        return own_SPTD.flatten(0, 1)[:GPTQ_SEQUENCES]
    room_SRPTD = own_SPTD.new_zeros((len(own_SPTD), ranks.size, *own_SPTD.shape[1:]), dtype=torch.float32)
    room_SRPTD[:, ranks.rank] = own_SPTD
    return (ranks.mean(room_SRPTD) * ranks.size).flatten(0, 2)[:GPTQ_SEQUENCES].to(own_SPTD.dtype)


def _of_first_rank(weight: QuantizedWeight, ranks: Ranks) -> QuantizedWeight:
    """Return rank 0's codes on every rank: a tie that rounds differently must not lead the ranks apart."""
    codes = weight.codes.float() * (ranks.size if ranks.rank == 0 else 0)
    return replace(weight, codes=ranks.mean(codes).round().to(weight.codes.dtype))
