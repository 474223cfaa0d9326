"""What a node is expected to cost, from the model's shape and the rates of a machine (machines.json)."""

import math
from dataclasses import replace

from prefixquant.kernels.hadamard import has_hadamard
from prefixquant.kernels.hadamard.reference import hadamard_axes
from prefixquant.pipeline.cost import SEARCH_BYTES, Cost, forward_work
from prefixquant.pipeline.graph import Estimate, Node
from prefixquant.pipeline.machines import Machine, Work
from prefixquant.pipeline.shape import Shape
from prefixquant.pipeline.training_estimates import training_cost
from prefixquant.tasks.evaluate import BATCH_TOKENS, windows_a_batch
from prefixquant.tasks.model.sites import ALL_SITES
from prefixquant.tasks.profiles.export import MEASURED_TOKENS
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.train_chain import FORWARD_TOKENS

ROTATION_BYTES = 24
"""Float64 matrices at hand while the largest one is rotated, in bytes of its entries, beside the whole block."""

ROUNDING_POINTS = 8
"""Points of a search of weights in the time of rounding them."""

ROUNDING_BYTES = 14
"""Float32 matrices at hand while the largest one is rounded, in bytes of its entries."""

GPTQ_BYTES = 20
"""Float32 matrices at hand while the Gram matrix of GPTQ is factorized, in bytes of its entries."""

COLUMNS_A_FORWARD = 50
"""Columns that GPTQ rounds in the time of the launches of one forward."""


def estimate(node: Node, shape: Shape, machine: Machine, ranks: int = 1) -> Estimate:
    """Return the cost of a node on a machine: one CPU core, or one GPU. With several ranks, that of one of them."""
    cost = _cost(node, shape, machine, ranks)
    gpu = machine.is_gpu and node.resources.gpus > 0
    return Estimate(
        seconds=machine.time(replace(cost.work, written_bytes=cost.stored)),
        host_bytes=int(machine.process_bytes + cost.host + (cost.staged if gpu else cost.device)),
        device_bytes=int(cost.device) if gpu else 0,
        stored_bytes=int(cost.stored),
        read_bytes=int(cost.work.read_bytes),
        disk_bytes=int(cost.disk),
    )


def work_of(node: Node, shape: Shape, machine: Machine) -> Work:
    """Return what a node has to do."""
    cost = _cost(node, shape, machine)
    return replace(cost.work, written_bytes=cost.stored)


def _cost(node: Node, shape: Shape, machine: Machine, ranks: int = 1) -> Cost:
    shape = replace(shape, on_cpu=not machine.is_gpu)
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
            return training_cost(node.task.name, node.config, shape, machine, ranks)
        case "evaluate" | "evaluate_part" | "tasks" | "tasks_part" if "parts" not in node.inputs:
            measured, shards = getattr(node.config, "of", node.config), getattr(node.config, "shards", 1)
            quantized = measured.model.variant == "quantized"
            if node.task.name.startswith("tasks"):
                return _tasks(shape, shards=shards, gpus=measured.gpus, quantized=quantized)
            return _evaluate(shape, shards=shards, quantized=quantized)
        case "export_profile":
            return _profile(shape, verify=node.config.export.verify)
        case name:
            return Cost(work=Work(stage=name))


def _transform(kind: str | None, size: int) -> int:
    """Return the operations of a rotation, an element."""
    if kind == "hadamard" and has_hadamard(size):
        return 2 * sum(math.prod(axis) for axis in hadamard_axes(size))
    return 0 if kind is None else 2 * size


def _rotate(shape: Shape, rotate: RotateConfig) -> Cost:
    down = shape.linears[-1][0] * shape.linears[-1][1]
    values = 2 * shape.linears[2][0] * shape.linears[2][1]
    flops = (
        shape.parameters * _transform(rotate.r1, shape.hidden)
        + down * _transform("hadamard" if rotate.r4 else None, shape.intermediate)
        + values * _transform(rotate.r2, shape.head_dim)
    )
    return Cost(
        work=Work(stage="rotate", flops={"rotate": flops}, read_bytes=shape.block_bytes),
        device=8 * shape.parameters + ROTATION_BYTES * shape.largest,
        host=shape.block_bytes,
        staged=shape.block_bytes,
        stored=shape.block_bytes,
    )


def _rotate_ends(shape: Shape, rotate: RotateConfig) -> Cost:
    flops = 2 * shape.vocabulary * shape.hidden * _transform(rotate.r1, shape.hidden)
    return Cost(
        work=Work(stage="rotate", flops={"rotate": flops}, read_bytes=shape.ends_bytes),
        device=min(8192, shape.vocabulary) * shape.hidden * 8 * 4,
        host=2 * shape.ends_bytes,
        stored=shape.ends_bytes,
    )


def _walk(stage: str, shape: Shape, walks: int, tokens: int) -> Cost:
    """Return the cost of walking through all blocks, once of them with the statistics' tokens."""
    passes = forward_work(shape, tokens, shape.blocks)
    reads = walks * shape.blocks * shape.block_bytes + shape.ends_bytes
    if stage == "prefix":
        reads += (walks - 1) * shape.ends_bytes
    return Cost(
        work=Work(stage=stage, blocks=walks * shape.blocks, read_bytes=reads, **passes),
        # The embeddings, what entered the block and what it puts out; the prefix passes with the next block at hand.
        device=max(
            shape.block_bytes + 3 * shape.stream_bytes(tokens) + shape.forward_bytes(min(FORWARD_TOKENS, tokens)),
            2 * shape.block_bytes if stage == "prefix" else 0,
        ),
        host=4 * tokens * (shape.blocks if stage == "prefix" else 0),
        staged=shape.block_bytes,
    )


def _stream(shape: Shape, *, computed: bool) -> Cost:
    stored = shape.stream_bytes(shape.search_tokens)
    if not computed:
        return Cost(work=Work(stage="stream", read_bytes=shape.ends_bytes), host=2 * stored, stored=stored)
    return Cost(
        work=Work(
            stage="stream",
            blocks=1,
            read_bytes=shape.block_bytes + stored,
            **forward_work(shape, shape.search_tokens),
        ),
        device=shape.block_bytes + shape.forward_bytes(min(FORWARD_TOKENS, shape.search_tokens)),
        host=2 * stored,
        staged=shape.block_bytes,
        stored=stored,
    )


def _search(shape: Shape, *, rounds: bool) -> Cost:
    """Return the cost of searching a block's scales; `rounds`: and of rounding its weights by GPTQ."""
    search, tokens = shape.search, shape.search_tokens
    ratios = 0 if search is None else len(ALL_SITES) * (search.coarse_points + search.fine_points)
    points = search.weight_points if search is not None and search.weights else 0
    gram_inputs = {inputs: min(shape.group_size or inputs, inputs) for _, inputs in shape.linears}
    products = sum(2.0 * outputs * inputs * gram_inputs[inputs] for outputs, inputs in shape.linears) * points
    grams = sum(2.0 * tokens * inputs * gram_inputs[inputs] for _, inputs in shape.linears) if points else 0
    passes = forward_work(shape, tokens, ratios + 3 + (1 if points else 0))
    passes["flops"] |= {"search": products + grams}
    passes["elements"] |= {"search": float((points + ROUNDING_POINTS) * shape.parameters)}
    inverses = 0
    if rounds:  # of each linear a Gram matrix, its factor, and a sweep over the inputs, some kernels a column
        passes["flops"]["search"] += sum(
            2.0 * tokens * inputs**2 + 2.0 * inputs**3 + outputs * inputs**2 for outputs, inputs in shape.linears
        )
        passes["forwards"] += 5 + sum(inputs for _, inputs in shape.linears) / COLUMNS_A_FORWARD
        inverses = GPTQ_BYTES * max(inputs for _, inputs in shape.linears) ** 2
    stream = shape.stream_bytes(tokens)
    return Cost(
        work=Work(stage="block", blocks=1, read_bytes=shape.block_bytes + stream, **passes),
        # The weights as they were and on their grid, the codes, the stream, its target and an output, the grams.
        device=2 * shape.block_bytes
        + 2 * shape.parameters
        + 3 * stream
        + (sum(4 * inputs * gram_inputs[inputs] for _, inputs in shape.linears) if points else 0)
        + max(
            # With the kernels of a GPU the search itself needs less than rounding does after it.
            (SEARCH_BYTES if points and shape.on_cpu else ROUNDING_BYTES) * shape.largest,
            inverses,
            shape.forward_bytes(min(FORWARD_TOKENS, tokens)),
        ),
        host=stream + shape.quantized_bytes,
        staged=shape.block_bytes,
        stored=shape.quantized_bytes,
    )


def _logits_bytes(shape: Shape, tokens: int) -> int:
    """Of logits in float32 and their softmax."""
    return tokens * shape.vocabulary * (8 if shape.dtype == "float32" else 10)


def _evaluate(shape: Shape, *, shards: int, quantized: bool) -> Cost:
    """Return the cost of measuring one of so many shares of a text, with a block held at a time."""
    tokens = -(-shape.evaluation_tokens // shards)
    passes = forward_work(shape, tokens, shape.blocks, logits=tokens)
    block = shape.quantized_bytes if quantized else shape.block_bytes
    stream, head = shape.stream_bytes(tokens), shape.ends_bytes / 2
    at_once = min(windows_a_batch(shape.window) * shape.window, tokens)
    in_blocks = shape.block_bytes + 2 * stream + shape.forward_bytes(at_once)
    return Cost(
        work=Work(
            stage="evaluate",
            blocks=shape.blocks,
            read_bytes=shape.blocks * block + shape.ends_bytes,
            **passes,
        ),
        device=max(in_blocks, stream + head + _logits_bytes(shape, shape.window)),
        host=head,
        staged=shape.block_bytes,
    )


def _tasks(shape: Shape, *, shards: int, gpus: int, quantized: bool) -> Cost:
    """Return the cost of answering one of so many shares of a task, with the model whole over so many GPUs."""
    tokens = -(-shape.task_tokens // shards)
    passes = forward_work(shape, tokens, shape.blocks, logits=tokens)
    block = shape.quantized_bytes if quantized else shape.block_bytes
    whole = shape.blocks * shape.block_bytes + shape.ends_bytes
    batch = min(BATCH_TOKENS, tokens)
    return Cost(
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


def _profile(shape: Shape, *, verify: bool) -> Cost:
    """Return the cost of writing, measuring and comparing a profile: planning walks five times, measuring twice."""
    planning, measuring = min(MEASURED_TOKENS, shape.search_tokens), min(MEASURED_TOKENS, shape.evaluation_tokens)
    passes = forward_work(shape, 5 * planning + 2 * measuring, shape.blocks, logits=2 * measuring)
    folder = shape.blocks * shape.quantized_bytes + shape.ends_bytes
    tokens = max(planning, measuring)
    whole = 4 * (shape.blocks * shape.parameters + 2 * shape.vocabulary * shape.hidden)  # the gate's, in float32
    return Cost(
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
