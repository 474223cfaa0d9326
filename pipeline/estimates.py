"""What a node is expected to cost, from the model's shape and the rates of a machine (machines.json).

Letters of the comments: P parameters of a block, m of its largest matrix, T tokens, H hidden, I intermediate channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from prefixquant.kernels.hadamard import has_hadamard
from prefixquant.kernels.hadamard.reference import hadamard_axes
from prefixquant.pipeline.graph import Estimate, Node
from prefixquant.pipeline.machines import Machine, Work
from prefixquant.pipeline.recipe import Recipe
from prefixquant.tasks.evaluate import BATCH_TOKENS
from prefixquant.tasks.load import LoadedModel
from prefixquant.tasks.model.sites import ALL_SITES, head_size
from prefixquant.tasks.profiles.export import MEASURED_TOKENS
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.search import SearchConfig
from prefixquant.tasks.streams import DEVICE_SHARE
from prefixquant.tasks.train_chain import FORWARD_TOKENS
from prefixquant.tasks.train_config import TrainConfig

ACTIVATION_BYTES = 26
"""Kept for the backward of a training step, a token and channel (H + I); from blocks of 8B and 70B models."""

LOGIT_COPIES = 15
"""Float32 tensors of the size of 1024 tokens' logits that the loss past the last block holds at once; on an H200."""

CPU_LOGIT_COPIES = 5
"""The same on a CPU."""

ROTATION_BYTES = 24
"""Float64 matrices at hand while the largest one is rotated, in bytes of its entries, beside the whole block."""

SEARCH_BYTES = 30
"""Float32 matrices at hand while the scales of the largest one are searched, in bytes of its entries."""

GPTQ_BYTES = 20
"""Float32 matrices at hand while the Gram matrix of GPTQ is factorized, in bytes of its entries."""

COLUMNS_A_FORWARD = 50
"""Columns that GPTQ rounds in the time of the launches of one forward."""

TOKENS_A_DOCUMENT = 200
"""Of a task of lm-eval: four choices of fifty tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a run."""

    hidden: int
    intermediate: int
    vocabulary: int
    head_dim: int
    linears: tuple[tuple[int, int], ...]
    """Outputs and inputs of the seven linears of a block."""

    blocks: int
    dtype: str
    bytes_per_weight: int
    bits: int
    """Of a stored weight."""

    group_size: int | None
    statistics_tokens: int
    search_tokens: int
    evaluation_tokens: int
    window: int
    task_tokens: int
    """Of a task of lm-eval, whose documents nobody has counted yet."""

    search: SearchConfig | None
    searches_prefix: bool
    sequences: Mapping[str, int]
    """Windows of the search and of the statistics."""

    @classmethod
    def of(cls, model: LoadedModel, dtype: str, recipe: Recipe) -> "Shape":
        """Return the sizes for a model and a recipe."""
        config, data, weights = model.config, recipe.data, recipe.quantize.weights
        item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        windows = recipe.evaluate.max_windows or 133
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            head_dim=head_size(config),
            linears=_linears(config),
            blocks=model.num_blocks,
            dtype=dtype,
            bytes_per_weight=item,
            bits=8 * item if weights is None else weights.bits,
            group_size=None if weights is None else weights.group_size,
            statistics_tokens=data.statistics.sequences * data.statistics.length,
            search_tokens=data.search.sequences * data.search.length,
            evaluation_tokens=windows * recipe.evaluate.window,
            window=recipe.evaluate.window,
            task_tokens=TOKENS_A_DOCUMENT * (recipe.evaluate.limit or 2000) * (1 + (recipe.evaluate.shots or 0)),
            search=recipe.search,
            searches_prefix=recipe.prefix.tokens is None,
            sequences={"search": data.search.sequences, "statistics": data.statistics.sequences},
        )

    @property
    def parameters(self) -> int:
        """Of a block."""
        return sum(outputs * inputs for outputs, inputs in self.linears)

    @property
    def largest(self) -> int:
        """Parameters of the largest matrix of a block."""
        return max(outputs * inputs for outputs, inputs in self.linears)

    @property
    def block_bytes(self) -> int:
        """Of a block's weights as kept."""
        return self.parameters * self.bytes_per_weight

    @property
    def quantized_bytes(self) -> int:
        """Of a quantized block as stored."""
        return self.parameters * self.bits // 8

    @property
    def ends_bytes(self) -> int:
        """Of embedding and head."""
        return 2 * self.vocabulary * self.hidden * self.bytes_per_weight

    @property
    def channels(self) -> int:
        """What the element-wise work of a token grows with."""
        return self.hidden + self.intermediate

    def stream_bytes(self, tokens: int) -> int:
        """Of the hidden states of so many tokens."""
        return tokens * self.hidden * self.bytes_per_weight

    def forward_bytes(self, tokens: int) -> int:
        """At hand in a forward of so many tokens, nothing kept for a backward."""
        return tokens * (4 * self.intermediate + 6 * self.hidden) * self.bytes_per_weight


def _linears(config: PretrainedConfig) -> tuple[tuple[int, int], ...]:
    hidden, wide, head = config.hidden_size, config.intermediate_size, head_size(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return (
        (queries, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, queries),
        (wide, hidden),
        (wide, hidden),
        (hidden, wide),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cost:
    work: Work
    device: float = 0
    """Bytes of tensors where the task computes."""

    host: float = 0
    """Bytes beside these in host memory, even if a GPU computes."""

    stored: float = 0

    disk: float = 0
    """Bytes of local disk while it runs."""


def estimate(node: Node, shape: Shape, machine: Machine, ranks: int = 1) -> Estimate:
    """Return the cost of a node on a machine: one CPU core, or one GPU. With several ranks, that of one of them."""
    cost = _cost(node, shape, machine, ranks)
    gpu = machine.memory_bytes > 0 and node.resources.gpus > 0
    return Estimate(
        seconds=machine.time(replace(cost.work, written_bytes=cost.stored)),
        host_bytes=int(machine.process_bytes + cost.host + (0 if gpu else cost.device)),
        device_bytes=int(cost.device) if gpu else 0,
        stored_bytes=int(cost.stored),
        read_bytes=int(cost.work.read_bytes),
        disk_bytes=int(cost.disk),
    )


def work_of(node: Node, shape: Shape, machine: Machine) -> Work:
    """Return what a node has to do."""
    cost = _cost(node, shape, machine)
    return replace(cost.work, written_bytes=cost.stored)


def _cost(node: Node, shape: Shape, machine: Machine, ranks: int = 1) -> _Cost:
    match node.task.name:
        case "rotate":
            rotate = node.config.rotate
            return _rotate_ends(shape, rotate) if node.config.block is None else _rotate(shape, rotate)
        case "prefix":
            searched = "windows" in node.inputs
            known = node.config.find.tokens
            walks = int(searched) + int(searched or bool(known))
            return _walk("prefix", shape, walks, shape.statistics_tokens if searched else 0)
        case "calibrate":
            return _walk("calibrate", shape, 1, shape.statistics_tokens)
        case "stream":
            return _stream(shape, computed=node.config.block > 0)
        case "block":
            return _search(shape, rounds=node.config.gptq is not None)
        case "train" | "polish":
            return _train(node.task.name, node.config, shape, machine, ranks)
        case "evaluate" | "evaluate_part" | "tasks" | "tasks_part" if "parts" not in node.inputs:
            measured, shards = getattr(node.config, "of", node.config), getattr(node.config, "shards", 1)
            quantized = measured.model.variant == "quantized"
            if node.task.name.startswith("tasks"):
                return _tasks(shape, shards=shards, gpus=measured.gpus, quantized=quantized)
            return _evaluate(shape, shards=shards, quantized=quantized)
        case "export_profile":
            return _profile(shape, verify=node.config.export.verify)
        case name:
            return _Cost(work=Work(stage=name))


def _forward(shape: Shape, tokens: int, blocks: float = 1) -> dict[str, Any]:
    """Return the work of passing tokens through blocks."""
    return {
        "flops": {f"forward_{_rate(shape.dtype)}": 2.0 * shape.parameters * tokens * blocks},
        "elements": {"forward": float(tokens * shape.channels * blocks)},
        "forwards": blocks * max(1, -(-tokens // FORWARD_TOKENS)) if tokens else 0,
    }


def _rate(dtype: str) -> str:
    return "float32" if dtype == "float32" else "bfloat16"


def _transform(kind: str | None, size: int) -> int:
    """Return the operations of a rotation, an element."""
    if kind == "hadamard" and has_hadamard(size):
        return 2 * sum(math.prod(axis) for axis in hadamard_axes(size))
    return 0 if kind is None else 2 * size


def _rotate(shape: Shape, rotate: RotateConfig) -> _Cost:
    down = shape.linears[-1][0] * shape.linears[-1][1]
    values = 2 * shape.linears[2][0] * shape.linears[2][1]
    flops = (
        shape.parameters * _transform(rotate.r1, shape.hidden)
        + down * _transform("hadamard" if rotate.r4 else None, shape.intermediate)
        + values * _transform(rotate.r2, shape.head_dim)
    )
    return _Cost(
        work=Work(stage="rotate", flops={"rotate": flops}, read_bytes=shape.block_bytes),
        device=8 * shape.parameters + ROTATION_BYTES * shape.largest,
        host=2 * shape.block_bytes,
        stored=shape.block_bytes,
    )


def _rotate_ends(shape: Shape, rotate: RotateConfig) -> _Cost:
    flops = 2 * shape.vocabulary * shape.hidden * _transform(rotate.r1, shape.hidden)
    return _Cost(
        work=Work(stage="rotate", flops={"rotate": flops}, read_bytes=shape.ends_bytes),
        device=min(8192, shape.vocabulary) * shape.hidden * 8 * 4,
        host=2 * shape.ends_bytes,
        stored=shape.ends_bytes,
    )


def _walk(stage: str, shape: Shape, walks: int, tokens: int) -> _Cost:
    """Return the cost of walking through all blocks, once of them with the statistics' tokens."""
    passes = _forward(shape, tokens, shape.blocks)
    reads = walks * shape.blocks * shape.block_bytes + shape.ends_bytes
    if stage == "prefix":
        reads += (walks - 1) * shape.ends_bytes
    return _Cost(
        work=Work(stage=stage, blocks=walks * shape.blocks, read_bytes=reads, **passes),
        device=shape.block_bytes + 2 * shape.stream_bytes(tokens) + shape.forward_bytes(min(FORWARD_TOKENS, tokens)),
        host=shape.block_bytes + 4 * tokens * (shape.blocks if stage == "prefix" else 0),
    )


def _stream(shape: Shape, *, computed: bool) -> _Cost:
    stored = shape.stream_bytes(shape.search_tokens)
    if not computed:
        return _Cost(work=Work(stage="stream", read_bytes=shape.ends_bytes), host=2 * stored, stored=stored)
    return _Cost(
        work=Work(
            stage="stream",
            blocks=1,
            read_bytes=shape.block_bytes + stored,
            **_forward(shape, shape.search_tokens),
        ),
        device=shape.block_bytes + shape.forward_bytes(min(FORWARD_TOKENS, shape.search_tokens)),
        host=shape.block_bytes + 2 * stored,
        stored=stored,
    )


def _search(shape: Shape, *, rounds: bool) -> _Cost:
    """Return the cost of searching a block's scales; `rounds`: and of rounding its weights by GPTQ."""
    search, tokens = shape.search, shape.search_tokens
    ratios = 0 if search is None else len(ALL_SITES) * (search.coarse_points + search.fine_points)
    points = search.weight_points if search is not None and search.weights else 0
    gram_inputs = {inputs: min(shape.group_size or inputs, inputs) for _, inputs in shape.linears}
    products = sum(2.0 * outputs * inputs * gram_inputs[inputs] for outputs, inputs in shape.linears) * points
    grams = sum(2.0 * tokens * inputs * gram_inputs[inputs] for _, inputs in shape.linears) if points else 0
    passes = _forward(shape, tokens, ratios + 3 + (1 if points else 0))
    passes["flops"] |= {"search": products + grams}
    passes["elements"] |= {"search": float(points * shape.parameters)}
    inverses = 0
    if rounds:  # of each linear a Gram matrix, its factor, and a sweep over the inputs, some kernels a column
        passes["flops"]["search"] += sum(
            2.0 * tokens * inputs**2 + 2.0 * inputs**3 + outputs * inputs**2 for outputs, inputs in shape.linears
        )
        passes["forwards"] += 5 + sum(inputs for _, inputs in shape.linears) / COLUMNS_A_FORWARD
        inverses = GPTQ_BYTES * max(inputs for _, inputs in shape.linears) ** 2
    stream = shape.stream_bytes(tokens)
    return _Cost(
        work=Work(stage="block", blocks=1, read_bytes=shape.block_bytes + stream, **passes),
        # The weights as they were and on their grid, the codes, the stream, its target and an output, the grams.
        device=2 * shape.block_bytes
        + 2 * shape.parameters
        + 3 * stream
        + (sum(4 * inputs * gram_inputs[inputs] for _, inputs in shape.linears) if points else 0)
        + max(SEARCH_BYTES * shape.largest, inverses, shape.forward_bytes(min(FORWARD_TOKENS, tokens))),
        host=shape.block_bytes + stream + shape.quantized_bytes,
        stored=shape.quantized_bytes,
    )


def train_bytes(shape: Shape, train: TrainConfig, *, ranks: int = 1, last: bool = True, gpu: bool = True) -> float:
    """Return the bytes on a rank's device while a block is trained, the streams aside.

    `last`: whether the blocks whose loss is that of the logits are among them.
    """
    tokens = train.batch_size // ranks * train.sequence_length
    kept = ACTIVATION_BYTES * tokens * shape.channels
    # Float32: the weight and two moments (of the rank's rows; with ZeRO the moments alone are divided), the best epoch.
    # Bfloat16: the weight on its grid. Gradients replace the activations in the course of the backward.
    owned = 12 / ranks if train.sharding == "rows" else 4 + 8 / ranks
    states = (owned + 4) * shape.parameters
    peak = states + max(2 * shape.parameters + kept, 4 * shape.parameters + SEARCH_BYTES * shape.largest / 4)
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
    fits = machine.memory_bytes > 0 and total < DEVICE_SHARE * machine.memory_bytes
    return ("device" if fits else "host"), total


def _train(stage: str, config: Any, shape: Shape, machine: Machine, ranks: int) -> _Cost:
    train: TrainConfig = config.train
    trained = config.stop - config.first
    tokens = train.sequences * train.sequence_length
    held_out = train.validation_sequences * train.sequence_length
    steps = train.epochs * (train.sequences // train.batch_size) * trained
    passed = 1 + train.lookahead
    # Forward and backward of the block, and, without gradients of weights, of those it looks through.
    training = train.epochs * tokens * trained * (6.0 + 4.0 * train.lookahead) * shape.parameters
    # Both streams pass every block, and the validation loss once an epoch and before.
    streams = (tokens + held_out) * (config.stop + trained - 1)
    streams += (train.epochs + 1) * held_out * passed * trained
    if train.target != "fp_input":
        streams += (tokens + held_out) * passed * trained
    passes = _forward(shape, streams // ranks)
    looked = 1 + 0.67 * train.lookahead
    # Past the last block the loss is that of the logits: of output and target, again in the backward, and its gradient.
    last = max(0, config.stop - max(config.first, shape.blocks - train.lookahead))
    head = 2.0 * shape.vocabulary * shape.hidden * last
    training += head * (5 * train.epochs * tokens + 2 * (train.epochs + 1) * held_out)
    passes["flops"] |= {"train": training / ranks}
    passes["elements"] |= {"train": train.epochs * tokens * trained * shape.channels * looked / ranks}
    # A step gathers weights and reduces gradients: with rows in 16 bits and recorded as a graph, with ZeRO in 32.
    rows = train.sharding == "rows"
    exchanged = 2 * (2 if rows else 4) * shape.parameters * (ranks - 1) / ranks
    graphed = rows or ranks == 1
    place, stream_bytes = stream_place(shape, train, machine, ranks)
    reads = (config.stop + trained + train.lookahead) * shape.block_bytes + trained * shape.quantized_bytes
    return _Cost(
        work=Work(
            stage=stage,
            updates=steps
            * shape.parameters
            * (1 / ranks if rows else (1 + 1 / ranks) / 2),  # ZeRO shards the optimizer
            steps=steps * passed if graphed else 0,
            eager_steps=0 if graphed else steps * passed,
            exchanged_bytes=steps * exchanged,
            blocks=config.stop + 2 * trained,
            trained_blocks=trained,
            read_bytes=reads + shape.ends_bytes,
            **passes,
        ),
        device=train_bytes(shape, train, ranks=ranks, last=last > 0, gpu=machine.memory_bytes > 0)
        + (stream_bytes if place == "device" else 0),
        host=4 * shape.parameters + 2 * shape.block_bytes + shape.ends_bytes + (stream_bytes if place == "host" else 0),
        stored=shape.quantized_bytes * trained,
        disk=stream_bytes if place == "disk" else 0,
    )


def _head(shape: Shape, tokens: int) -> float:
    """Return the operations of the logits of so many tokens."""
    return 2.0 * tokens * shape.hidden * shape.vocabulary


def _logits_bytes(shape: Shape, tokens: int) -> int:
    """Of logits in float32 and their softmax."""
    return tokens * shape.vocabulary * (8 if shape.dtype == "float32" else 10)


def _evaluate(shape: Shape, *, shards: int, quantized: bool) -> _Cost:
    """Return the cost of measuring one of so many shares of a text, with a block held at a time."""
    tokens = -(-shape.evaluation_tokens // shards)
    passes = _forward(shape, tokens, shape.blocks)
    passes["flops"][f"forward_{_rate(shape.dtype)}"] += _head(shape, tokens)
    block = shape.quantized_bytes if quantized else shape.block_bytes
    stream, head = shape.stream_bytes(tokens), shape.ends_bytes / 2
    in_blocks = shape.block_bytes + 2 * stream + shape.forward_bytes(min(FORWARD_TOKENS, tokens))
    return _Cost(
        work=Work(
            stage="evaluate",
            blocks=shape.blocks,
            read_bytes=shape.blocks * block + shape.ends_bytes,
            **passes,
        ),
        device=max(in_blocks, stream + head + _logits_bytes(shape, shape.window)),
        host=shape.block_bytes + head,
    )


def _tasks(shape: Shape, *, shards: int, gpus: int, quantized: bool) -> _Cost:
    """Return the cost of answering one of so many shares of a task, with the model whole over so many GPUs."""
    tokens = -(-shape.task_tokens // shards)
    passes = _forward(shape, tokens, shape.blocks)
    passes["flops"][f"forward_{_rate(shape.dtype)}"] += _head(shape, tokens)
    block = shape.quantized_bytes if quantized else shape.block_bytes
    whole = shape.blocks * shape.block_bytes + shape.ends_bytes
    batch = min(BATCH_TOKENS, tokens)
    return _Cost(
        work=Work(
            stage="tasks",
            blocks=shape.blocks,
            read_bytes=shape.blocks * block + shape.ends_bytes,
            **passes,
        ),
        device=whole / gpus + shape.forward_bytes(batch) + _logits_bytes(shape, batch),
        # transformers loads the original model whole before it goes to a GPU; the quantized one comes block by block.
        host=shape.ends_bytes + (shape.block_bytes if quantized or gpus > 1 else shape.blocks * shape.block_bytes),
    )


def _profile(shape: Shape, *, verify: bool) -> _Cost:
    """Return the cost of writing, measuring and comparing a profile: planning walks five times, measuring twice."""
    planning, measuring = min(MEASURED_TOKENS, shape.search_tokens), min(MEASURED_TOKENS, shape.evaluation_tokens)
    passes = _forward(shape, 5 * planning + 2 * measuring, shape.blocks)
    passes["flops"][f"forward_{_rate(shape.dtype)}"] += 2 * _head(shape, measuring)
    folder = shape.blocks * shape.quantized_bytes + shape.ends_bytes
    tokens = max(planning, measuring)
    whole = 4 * (shape.blocks * shape.parameters + 2 * shape.vocabulary * shape.hidden)  # the gate's, in float32
    return _Cost(
        work=Work(stage="export_profile", blocks=7 * shape.blocks, read_bytes=2 * folder, **passes),
        device=2 * shape.block_bytes
        + 2 * shape.stream_bytes(tokens)
        + shape.forward_bytes(min(FORWARD_TOKENS, tokens))
        + shape.ends_bytes
        + _logits_bytes(shape, shape.window),
        host=shape.ends_bytes + (whole if verify else 2 * shape.block_bytes),
        stored=folder,
        disk=2 * folder,
    )
