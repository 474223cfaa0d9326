"""What a node is expected to cost, from the model's shape: arithmetic and bytes over rates of common machines."""

from dataclasses import dataclass

import torch

from prefixquant.pipeline.graph import Estimate, Node
from prefixquant.pipeline.recipe import Recipe
from prefixquant.tasks.load import LoadedModel
from prefixquant.tasks.model.sites import ALL_SITES, head_size
from prefixquant.tasks.search import SearchConfig

PROCESS_BYTES = 900 * 2**20
"""Resident memory of a worker with torch and transformers imported; measured on CPU."""

GPU_PROCESS_BYTES = 2200 * 2**20
"""The same with CUDA started; measured on an H200."""

CPU_FLOPS = 1e11
"""float32 rate of one core in matrix products of these sizes; measured on one machine, good to a factor of 2."""

GPU_FLOPS = 3e13
"""float32 rate of an H100-class GPU in the same; likewise."""

_TOKENS_A_DOCUMENT = 200
"""Four choices of fifty tokens."""

OVERHEAD_S = 0.15
"""Of any task: start, read, publish."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a run."""

    block_parameters: int
    end_parameters: int
    hidden: int
    blocks: int
    bytes_per_weight: int
    statistics_tokens: int
    search_tokens: int
    evaluation_tokens: int
    task_tokens: int
    """Of a task of lm-eval, whose documents nobody has counted yet."""
    search_forwards: int
    weight_forwards: float
    """Cost of the weight search, in forwards of the search text."""
    quantized_block_bytes: int
    gpu: bool
    """Whether tasks run on a GPU."""

    @classmethod
    def of(cls, model: LoadedModel, dtype: str, recipe: Recipe, *, gpu: bool) -> "Shape":
        """Return the sizes for a model and a recipe."""
        config, data, search = model.config, recipe.data, recipe.search
        heads = (config.num_attention_heads + config.num_key_value_heads) * 2 * head_size(config)
        parameters = config.hidden_size * (heads + 3 * config.intermediate_size)
        item = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        bits = recipe.quantize.weights.bits if recipe.quantize.weights is not None else 8 * item
        windows = recipe.evaluate.max_windows or 128
        tokens = data.search.sequences * data.search.length
        searched = search.weight_points if search is not None and search.weights else 0
        return cls(
            block_parameters=parameters,
            end_parameters=2 * config.vocab_size * config.hidden_size,
            hidden=config.hidden_size,
            blocks=model.num_blocks,
            bytes_per_weight=item,
            statistics_tokens=data.statistics.sequences * data.statistics.length,
            search_tokens=tokens,
            evaluation_tokens=windows * recipe.evaluate.window,
            task_tokens=_TOKENS_A_DOCUMENT * (recipe.evaluate.limit or 2000) * (1 + (recipe.evaluate.shots or 0)),
            search_forwards=0 if search is None else _site_forwards(search),
            weight_forwards=searched * config.hidden_size / tokens,
            quantized_block_bytes=parameters * bits // 8,
            gpu=gpu,
        )

    @property
    def block_bytes(self) -> int:
        """Of a block's weights as kept."""
        return self.block_parameters * self.bytes_per_weight

    def stream_bytes(self, tokens: int) -> int:
        """Of the hidden states of so many tokens."""
        return tokens * self.hidden * self.bytes_per_weight


def _site_forwards(search: SearchConfig) -> int:
    return len(ALL_SITES) * (search.coarse_points + search.fine_points)


def _shards(node: Node) -> int:
    return int(getattr(node.config, "shards", 1))


def estimate(node: Node, shape: Shape) -> Estimate:
    """Return the cost of a node on one CPU core, or on one GPU."""
    forward = 2 * shape.block_parameters  # operations a token
    flops, work_bytes, stored = 0.0, 0, 0
    match node.task.name:
        case "rotate":
            ends = node.name == "rotate[ends]"
            parameters = shape.end_parameters if ends else shape.block_parameters
            flops = (
                2 * 4 * parameters * 64
            )  # float64 at a quarter of the rate; a transform is about 64 products a value
            stored = parameters * shape.bytes_per_weight
            work_bytes = stored + (0 if ends else 8 * 2 * parameters)
        case "prefix" | "calibrate":
            walks = 1 if node.task.name == "calibrate" else 2 * int("windows" in node.inputs)
            flops = walks * forward * shape.statistics_tokens * shape.blocks
            work_bytes = shape.block_bytes * 2 + 3 * shape.stream_bytes(shape.statistics_tokens)
        case "stream":
            flops = forward * shape.search_tokens
            stored = shape.stream_bytes(shape.search_tokens)
            work_bytes = 2 * shape.block_bytes + 2 * stored
        case "block":
            flops = forward * shape.search_tokens * (shape.search_forwards + 2 * shape.weight_forwards + 4)
            stored = shape.quantized_block_bytes
            work_bytes = 4 * shape.block_bytes + 4 * shape.stream_bytes(shape.search_tokens)
        case "train" | "polish":
            train = node.config.train
            sequences = train.sequences + train.validation_sequences
            tokens, blocks = sequences * train.sequence_length, node.config.stop - node.config.first
            flops = forward * blocks * train.epochs * tokens * (3 + 2 * train.lookahead)
            streams = 2 if train.target == "fp_input" else 3
            # float32: the weight, its gradient, the best epoch's copy, the moments; float32 and autocast activations.
            work_bytes = 5 * 4 * shape.block_parameters + streams * shape.stream_bytes(tokens)
            stored = shape.quantized_block_bytes * blocks
        case "evaluate" | "evaluate_part" if "parts" not in node.inputs:
            tokens = shape.evaluation_tokens // _shards(node)
            flops = (forward * shape.blocks + shape.end_parameters) * tokens
            work_bytes = shape.end_parameters * shape.bytes_per_weight + 3 * shape.stream_bytes(tokens)
        case "tasks" | "tasks_part" if "parts" not in node.inputs:
            flops = (forward * shape.blocks + shape.end_parameters) * shape.task_tokens / _shards(node)
            work_bytes = (shape.block_parameters * shape.blocks + shape.end_parameters) * shape.bytes_per_weight
        case "export_profile":
            parameters = shape.block_parameters * shape.blocks + shape.end_parameters
            # Planning walks over the blocks five times, measuring twice; the gate holds the model whole, in float32.
            flops = forward * shape.blocks * (5 * shape.search_tokens + 2 * shape.evaluation_tokens)
            stored = shape.quantized_block_bytes * shape.blocks + shape.end_parameters * shape.bytes_per_weight
            work_bytes = 4 * parameters if node.config.export.verify else 4 * shape.block_bytes
            work_bytes += shape.end_parameters * shape.bytes_per_weight
        case _:
            pass
    return Estimate(
        seconds=OVERHEAD_S + flops / (GPU_FLOPS if shape.gpu else CPU_FLOPS),
        host_bytes=(GPU_PROCESS_BYTES if shape.gpu else PROCESS_BYTES) + work_bytes,
        device_bytes=work_bytes if shape.gpu else 0,
        stored_bytes=stored,
    )
