"""What the training of blocks is expected to cost."""

from typing import Any

from prefixquant.pipeline.cost import SEARCH_BYTES, Cost, forward_work
from prefixquant.pipeline.machines import Machine, Work
from prefixquant.pipeline.shape import Shape
from prefixquant.tasks.streams import DEVICE_SHARE
from prefixquant.tasks.train_block import FORWARD_TOKENS as VALIDATION_TOKENS
from prefixquant.tasks.train_chain import FORWARD_TOKENS
from prefixquant.tasks.train_config import TrainConfig

ACTIVATION_BYTES = 26
"""Kept for the backward of a training step, a token and channel, hidden and intermediate; from 8B and 70B blocks."""

LOGIT_COPIES = 15
"""Float32 tensors of the size of 1024 tokens' logits that the loss past the last block holds at once; on an H200."""

CPU_LOGIT_COPIES = 5
"""The same on a CPU."""

EXPOSED_SHARE = 0.15
"""Of the exchange of ranks that own rows: what their products do not hide. 0.06 to 0.19 on 2 and 4 H100s."""


def train_bytes(shape: Shape, train: TrainConfig, *, ranks: int = 1, last: bool = True, gpu: bool = True) -> float:
    """Return the bytes on a rank's device while a block is trained, the streams aside.

    `last`: whether the blocks whose loss is that of the logits are among them.
    """
    tokens = train.batch_size // ranks * train.sequence_length
    kept = ACTIVATION_BYTES * tokens * shape.channels
    # Float32: the weight, two moments, which ranks divide, and the best epoch. Bfloat16: the weight on its grid.
    # Gradients replace the activations in the course of the backward.
    # Compiled, a single process may keep the codes of its weights in fp8 too.
    codes = 1 if gpu and ranks == 1 and train.compile != "never" else 0
    states = (4 + 8 / ranks + 4 + codes) * shape.parameters
    at_once = max(2 * shape.parameters + kept, 4 * shape.parameters + SEARCH_BYTES * shape.largest / 4)
    if ranks > 1 and train.sharding == "rows":
        # In 16 bits: gathered weights and gradients, those sent and those received, until the backward has ended.
        at_once = max(at_once, 8 * shape.parameters + kept / 2)
    peak = states + at_once
    ahead = min(train.lookahead, shape.blocks - 1)
    peak += (1 + ahead) * shape.block_bytes + ahead * kept
    if last and ahead:
        copies = LOGIT_COPIES if gpu else CPU_LOGIT_COPIES
        peak += shape.ends_bytes / 2 + copies * 4 * min(tokens, 1024) * shape.vocabulary
    return peak


def stream_place(shape: Shape, train: TrainConfig, machine: Machine, ranks: int = 1) -> tuple[str, float]:
    """Return where the streams of a rank are kept (device, host or disk), and their bytes."""
    tokens = (train.sequences + train.validation_sequences) * train.sequence_length // ranks
    total = (2 if train.target == "fp_input" else 3) * float(shape.stream_bytes(tokens))
    if train.offload_to_disk:
        return "disk", total
    fits = machine.is_gpu and total < DEVICE_SHARE * machine.memory_bytes
    return ("device" if fits else "host"), total


def training_cost(stage: str, config: Any, shape: Shape, machine: Machine, ranks: int) -> Cost:
    """Return what one of so many ranks has to do to train the blocks of a node; `stage`: its task's name."""
    train: TrainConfig = config.train
    trained = config.stop - config.first
    tokens = train.sequences * train.sequence_length
    held_out = train.validation_sequences * train.sequence_length
    steps = train.epochs * (train.sequences // train.batch_size)
    # Blocks that the trained ones look through, fewer at the end of the model; and those that the originals pass.
    ahead = sum(min(train.lookahead, shape.blocks - 1 - index) for index in range(config.first, config.stop))
    originals = min(config.stop + train.lookahead, shape.blocks)
    passed = trained + ahead
    # Forward and backward of the block, and, without gradients of weights, of those it looks through.
    training = train.epochs * tokens * (6.0 * trained + 4.0 * ahead) * shape.parameters
    # Both streams pass every block, and the validation loss once an epoch and before.
    streams = (tokens + held_out) * (originals + trained - 1)
    streams += (train.epochs + 1) * held_out * passed
    if train.target != "fp_input":
        streams += (tokens + held_out) * passed
    passes = forward_work(shape, streams // ranks)
    # Past the last block the loss is that of the logits: of output and target, again in the backward, and its gradient.
    last = max(0, config.stop - max(config.first, shape.blocks - train.lookahead))
    head = 2.0 * shape.vocabulary * shape.hidden * last
    training += head * (5 * train.epochs * tokens + 2 * (train.epochs + 1) * held_out)
    passes["flops"] |= {"train": training / ranks}
    passes["elements"] |= {"train": train.epochs * tokens * shape.channels * (trained + 0.67 * ahead) / ranks}
    # A step gathers weights and reduces gradients: with rows in 16 bits, beside the products and recorded as a graph;
    # with ZeRO in 32 bits and hidden by nothing.
    rows = train.sharding == "rows"
    exchanged = 2 * (2 * EXPOSED_SHARE if rows else 4) * shape.parameters * (ranks - 1) / ranks
    graphed = rows or ranks == 1
    place, stream_bytes = stream_place(shape, train, machine, ranks)
    stepping = train_bytes(shape, train, ranks=ranks, last=last > 0, gpu=machine.is_gpu)
    # Between the epochs more tokens pass at once than in a step: a share of the streams, or the validation loss.
    passing = 16 * shape.parameters + (1 + train.lookahead) * shape.block_bytes
    most = max(min(FORWARD_TOKENS, tokens + held_out), min(VALIDATION_TOKENS, held_out))
    passing += shape.forward_bytes(most // ranks)
    reads = (originals + trained) * shape.block_bytes + trained * shape.quantized_bytes
    # To the GPU the embeddings of all sequences; from it a block's float32 weights, once more copied for a second try.
    copied = shape.stream_bytes((tokens + held_out) // ranks) + 2 * 4 * shape.parameters * trained
    return Cost(
        work=Work(
            stage=stage,
            updates=steps
            * trained
            * shape.parameters
            * (1 / ranks if rows else (1 + 1 / ranks) / 2),  # ZeRO shards the optimizer
            steps=steps * passed if graphed else 0,
            eager_steps=0 if graphed else steps * passed,
            exchanged_bytes=steps * trained * exchanged,
            blocks=originals + 2 * trained,
            trained_blocks=trained,
            read_bytes=reads + shape.ends_bytes,
            copied_bytes=copied if machine.is_gpu else 0,
            **passes,
        ),
        device=max(stepping, passing) + (stream_bytes if place == "device" else 0),
        host=4 * shape.parameters + 2 * shape.block_bytes + shape.ends_bytes + (stream_bytes if place == "host" else 0),
        # The block as it is stored, and the largest weight of those that are copied from the GPU.
        staged=shape.quantized_bytes + 4 * shape.largest,
        stored=shape.quantized_bytes * trained,
        disk=stream_bytes if place == "disk" else 0,
    )
