"""The tasks of the DAG: each takes stored artifacts apart, calls one pure function, and declares name and version."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefixquant.pipeline.graph import Resources, Task
from prefixquant.pipeline.keys import outside_key
from prefixquant.pipeline.source import checkpoint_at, model_at
from prefixquant.pipeline.worker import TaskContext, TaskOutput
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.calibrate import CalibrateConfig, Ranges, calibrate_blocks
from prefixquant.tasks.evaluate import PerplexityConfig
from prefixquant.tasks.export import ENDS_FILE, PREFIX_FILE, block_file, export_files
from prefixquant.tasks.find_prefix import FindPrefixConfig, choose_prefix, down_input_peaks, prefix_key_values
from prefixquant.tasks.gptq import GptqConfig
from prefixquant.tasks.load import LoadedModel, read_ends, torch_dtype
from prefixquant.tasks.model.block import Block, block_prefix, block_shapes, run_batched
from prefixquant.tasks.model.saved import block_tensors
from prefixquant.tasks.model.sites import OnlineTransforms, head_size
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.quantize_block import quantize_block
from prefixquant.tasks.rotate import Ends, RotateConfig, rotate_block, rotate_ends
from prefixquant.tasks.search import SearchConfig
from prefixquant.tasks.texts import TextConfig, WindowsConfig, cut_windows, draw_windows, read_documents, tokenize

COMPUTE = Resources(gpus=1, cpus=1)
"""Of the tasks that pass data through blocks."""

CHEAP = Resources(cpus=0)
"""Of the tasks that compute nothing to speak of: none of them waits behind one that does."""

BATCH_TOKENS = 8192
"""Tokens of one forward through a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadNode:
    """Which checkpoint."""

    fingerprint: str
    """Digest of the source's files."""

    path: str = field(metadata=outside_key())
    """Where it is on this cluster."""


def run_load(context: TaskContext) -> TaskOutput:
    """Check a checkpoint and keep its config and tokenizer."""
    model = model_at(context.config.path)
    return TaskOutput(model.to_artifact(), metrics={"num_blocks": model.num_blocks})


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensNode:
    """Which text, and the windows taken from it."""

    fingerprint: str
    """Digest of the text's source."""

    windows: WindowsConfig | PerplexityConfig
    """Windows drawn at random (calibration) or one after the other (evaluation)."""

    where: str = field(metadata=outside_key())
    """Recipe key that sets the windows' length, for messages."""

    text: TextConfig = field(metadata=outside_key())
    """Where the text is; the fingerprint says what it is."""

    split: str
    """Part of the text."""


def run_tokens(context: TaskContext) -> TaskOutput:
    """Tokenize a text and cut windows from it."""
    config: TokensNode = context.config
    tokenizer = LoadedModel.from_artifact(context.inputs["load"]).tokenizer()
    tokens = tokenize(tokenizer, read_documents(config.text))
    if isinstance(config.windows, WindowsConfig):
        windows = draw_windows(tokens, config.windows, where=config.where)
    else:
        windows = cut_windows(tokens, config.windows.window, config.windows.max_windows, where=config.where)
    return TaskOutput(Artifact(tensors={"windows": windows}), metrics={"text_tokens": tokens.numel()})


@dataclass(frozen=True, kw_only=True, slots=True)
class RotateNode:
    """Which block is rotated, and how. No block: the ends of the model."""

    rotate: RotateConfig
    dtype: str
    block: int | None
    path: str = field(metadata=outside_key())


def run_rotate(context: TaskContext) -> TaskOutput:
    """Fold gains and rotations into one block, or into embedding and head."""
    config: RotateNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    family, checkpoint = model.family, checkpoint_at(config.path, model.index)
    options: dict[str, Any] = {"dtype": torch_dtype(config.dtype), "device": context.device}
    if config.block is None:
        ends = read_ends(checkpoint, family)
        context.traffic.read += sum(part.nbytes for part in (ends.embedding, ends.gain, ends.head))
        return TaskOutput(_ends_artifact(rotate_ends(ends, config.rotate, **options), model))
    weights = checkpoint.read_block(family, config.block, block_shapes(model.config, config.block))
    context.traffic.read += sum(weight.nbytes for weight in weights.values())
    head_dim = head_size(model.config)
    return TaskOutput(Artifact(rotate_block(weights, family, head_dim, config.block, config.rotate, **options)))


def _ends_artifact(ends: Ends, model: LoadedModel) -> Artifact:
    family = model.family
    names = {family.embedding: ends.embedding, family.final_norm: ends.gain, family.head: ends.head}
    return Artifact(tensors={f"{name}.weight": tensor for name, tensor in names.items()})


def model_ends(artifact: Artifact, model: LoadedModel) -> Ends:
    """Return what `rotate[ends]` holds."""
    tensors, family = artifact.tensors, model.family
    return Ends(*(tensors[f"{name}.weight"] for name in (family.embedding, family.final_norm, family.head)))


def _block(
    context: TaskContext,
    model: LoadedModel,
    index: int,
    weights: Mapping[str, Tensor],
    transforms: OnlineTransforms,
    quantize: QuantizeConfig | None = None,
) -> Block:
    return Block(
        model.config, model.family, index, weights, transforms=transforms, quantize=quantize, device=context.device
    )


class RotatedBlocks(Sequence[Block]):
    """The rotated blocks of a model, each built when taken."""

    def __init__(
        self, context: TaskContext, model: LoadedModel, transforms: OnlineTransforms, quantize: QuantizeConfig | None
    ) -> None:
        self._artifacts: Sequence[Artifact] = context.inputs["blocks"]
        self._build = partial(_block, context, model, transforms=transforms, quantize=quantize)

    def __len__(self) -> int:
        return len(self._artifacts)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return self._build(index=index, weights=self._artifacts[index].tensors)


def _batch_size(windows: Tensor, context: TaskContext) -> int:
    return max(1, BATCH_TOKENS // context.parts // windows.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixNode:
    """How the prefix is found, and the transforms the model then runs with."""

    find: FindPrefixConfig
    transforms: OnlineTransforms


def run_prefix(context: TaskContext) -> TaskOutput:
    """Choose the prefix tokens and compute their keys and values in every block."""
    config: PrefixNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    record: dict[str, Any] = {}
    if config.find.tokens is not None:
        token_ids = config.find.tokens
    else:
        assert model.bos_token_id is not None  # `check_fit` has seen to it
        ends = model_ends(context.inputs["ends"], model)
        windows = context.inputs["windows"].tensors["windows"]
        blocks = RotatedBlocks(context, model, config.transforms, None)
        stream = ends.embedding[windows].to(context.device)
        peaks = down_input_peaks(blocks, stream, batch_size=_batch_size(windows, context), device=context.device)
        choice = choose_prefix(windows, peaks, model.bos_token_id, config.find)
        token_ids = choice.token_ids
        record = {
            "counts": {str(token): count for token, count in choice.counts.items()},
            "outliers_per_sequence": list(choice.outliers_per_sequence),
            "peak_ratio": list(choice.peak_ratio),
        }
    tensors = {}
    if token_ids:
        blocks = RotatedBlocks(context, model, config.transforms, None)
        hidden = model_ends(context.inputs["ends"], model).embedding[torch.tensor(token_ids)]
        keys, values = prefix_key_values(blocks, hidden, device=context.device)
        tensors = {"keys": keys, "values": values}
    record |= {"token_ids": list(token_ids), "tokens": [model.tokenizer().decode([token]) for token in token_ids]}
    return TaskOutput(Artifact(tensors, record), metrics={"num_tokens": len(token_ids)})


def prefix_tensors(artifact: Artifact) -> tuple[Tensor, Tensor] | None:
    """Return keys and values [L, KV heads, P, head_dim] of the prefix; None if there is none."""
    return (artifact.tensors["keys"], artifact.tensors["values"]) if artifact.tensors else None


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateNode:
    """How ranges are averaged, and where the keys' site sits."""

    calibrate: CalibrateConfig
    transforms: OnlineTransforms
    quantize: QuantizeConfig


def run_calibrate(context: TaskContext) -> TaskOutput:
    """Collect the ranges of every site of every block behind the prefix."""
    config: CalibrateNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    windows = context.inputs["windows"].tensors["windows"]
    stream = model_ends(context.inputs["ends"], model).embedding[windows].to(context.device)
    ranges = calibrate_blocks(
        RotatedBlocks(context, model, config.transforms, config.quantize),
        prefix_tensors(context.inputs["prefix"]),
        stream,
        config.calibrate,
        batch_size=_batch_size(windows, context),
        device=context.device,
    )
    tensors: dict[str, Tensor] = {}
    for block, sites in enumerate(ranges):
        for site, (low, high) in sites.items():
            tensors |= {f"{block}.{site}.low": low, f"{block}.{site}.high": high}
    return TaskOutput(Artifact(tensors))


def _ranges(artifact: Artifact, block: int) -> Ranges:
    names = {name.split(".")[1] for name in artifact.tensors if name.startswith(f"{block}.")}
    return {name: (artifact.tensors[f"{block}.{name}.low"], artifact.tensors[f"{block}.{name}.high"]) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamNode:
    """Into which block the stream goes: block 0 gets the embeddings, block b what block b-1 puts out."""

    block: int
    transforms: OnlineTransforms


def run_stream(context: TaskContext) -> TaskOutput:
    """Compute the full-precision stream that enters a block."""
    config: StreamNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    if config.block == 0:
        windows = context.inputs["windows"].tensors["windows"]
        return TaskOutput(Artifact({"stream": model_ends(context.inputs["ends"], model).embedding[windows]}))
    previous = config.block - 1
    block = _block(context, model, previous, context.inputs["block"].tensors, config.transforms)
    stream = context.inputs["stream"].tensors["stream"]
    prefix = block_prefix(prefix_tensors(context.inputs["prefix"]), previous, context.device)
    output = run_batched(
        partial(block, prefix=prefix), stream, _batch_size(stream, context), context.device, f"stream, block {previous}"
    )
    return TaskOutput(Artifact({"stream": output}))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockNode:
    """Which block is quantized, and how."""

    block: int
    transforms: OnlineTransforms
    quantize: QuantizeConfig
    search: SearchConfig | None
    gptq: GptqConfig | None
    """How the weights are rounded at the end; None: to nearest."""


def run_block(context: TaskContext) -> TaskOutput:
    """Search the scales of one block and round its weights."""
    config: BlockNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    weights = context.inputs["block"].tensors
    block = _block(context, model, config.block, weights, config.transforms, config.quantize)
    stream = context.inputs["stream"].tensors["stream"]
    result = quantize_block(
        block,
        _ranges(context.inputs["ranges"], config.block),
        stream.to(context.device),
        block_prefix(prefix_tensors(context.inputs["prefix"]), config.block, context.device),
        config.quantize.weights,
        config.search,
        batch_size=_batch_size(stream, context),
        gptq=config.gptq,
    )
    spec = config.quantize.weights
    tensors = block_tensors(weights, result.weights, result.sites, model.family, config.block, spec)
    errors = {"error": result.error, "error_before_search": result.error_before}
    if result.error_nearest is not None:
        errors["error_nearest"] = result.error_nearest
    record: dict[str, Any] = {**errors, "search": result.search, "tensors": sorted(tensors)}
    return TaskOutput(Artifact(tensors, record), metrics=errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportNode:
    """What the folder describes."""

    profile: str
    quantize: QuantizeConfig
    transforms: OnlineTransforms
    dtype: str


def run_export(context: TaskContext) -> TaskOutput:
    """Write the small files of the output folder; its shards are the stored artifacts themselves."""
    config: ExportNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    family = model.family
    shards = {block_file(i): tuple(record["tensors"]) for i, record in enumerate(context.inputs["blocks"].records())}
    shards[ENDS_FILE] = tuple(f"{name}.weight" for name in (family.embedding, family.final_norm, family.head))
    prefix = context.inputs["prefix"]
    files = export_files(
        model, config.quantize, config.transforms, config.dtype, tuple(prefix.record["token_ids"]), shards
    )
    record = {"shards": sorted(shards), "prefix_file": PREFIX_FILE if prefix.tensors else None}
    return TaskOutput(Artifact(record=record, files=files))


LOAD = Task(name="load", version=2, run=run_load)
TOKENS = Task(name="tokens", version=1, run=run_tokens)
ROTATE = Task(name="rotate", version=1, run=run_rotate)
PREFIX = Task(name="prefix", version=1, run=run_prefix)
CALIBRATE = Task(name="calibrate", version=1, run=run_calibrate)
STREAM = Task(name="stream", version=1, run=run_stream, ephemeral=True)
BLOCK = Task(name="block", version=1, run=run_block)
EXPORT = Task(name="export", version=1, run=run_export)
