"""The tasks of the DAG that measure: perplexity of texts, and tasks of lm-eval.

Each measurement may be cut into parts. The node that merges them has the key of the uncut one, since the numbers are
the same, so what has been measured in four parts is there for a run that would take two. Parts go once they are merged.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prefixquant.pipeline.graph import Task
from prefixquant.pipeline.keys import outside_key
from prefixquant.pipeline.source import checkpoint_at
from prefixquant.pipeline.stages import model_ends, prefix_tensors
from prefixquant.pipeline.worker import TaskContext, TaskOutput
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.evaluate import BATCH_TOKENS, block_nlls, merge_perplexity, share_of
from prefixquant.tasks.harness import Answer, HarnessConfig, Request, answer, build_requests, chunks_of, score
from prefixquant.tasks.load import LoadedModel, load_original, read_ends, torch_dtype
from prefixquant.tasks.model.block import Block, block_prefix, block_shapes, load_sites
from prefixquant.tasks.model.saved import Sites, block_weights
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.whole import build_model, device_map
from prefixquant.tasks.rotate import Ends

ANSWERS = "answers.json"
REQUESTS = "requests.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNode:
    """Which model is measured: the original one, or the quantized one behind its prefix."""

    variant: Literal["full_precision", "quantized"]
    transforms: OnlineTransforms | None
    quantize: QuantizeConfig | None
    dtype: str
    path: str = field(metadata=outside_key())


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityNode:
    """The perplexity of a model on the text that is an input."""

    model: ModelNode


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessNode:
    """The answers of a model to a task of lm-eval."""

    model: ModelNode
    harness: HarnessConfig
    folder: str | None = field(metadata=outside_key())
    """Of task files; the requests' key says what is in it."""
    gpus: int = field(metadata=outside_key())
    """Over which the model is spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartNode:
    """One part of a measurement."""

    of: PerplexityNode | HarnessNode
    shard: int
    shards: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestsNode:
    """What a task of lm-eval asks."""

    harness: HarnessConfig
    fingerprint: str | None
    """Digest of the folder of task files."""
    folder: str | None = field(metadata=outside_key())


def run_evaluate(context: TaskContext) -> TaskOutput:
    """Measure perplexity over the windows of one text, or merge what the parts measured."""
    if "parts" in context.inputs:
        parts = list(context.inputs["parts"])
        shares, window = [part.tensors["nll"] for part in parts], parts[0].record["window"]
    else:
        windows = context.inputs["windows"].tensors["windows"]
        shares, window = [_nlls(context, context.config.model, windows)], windows.shape[1]
    result = merge_perplexity(shares, window)
    return TaskOutput(
        Artifact({"nll": torch.cat(shares)}, asdict(result)), metrics={"ppl": result.ppl, "tokens": result.tokens}
    )


def run_evaluate_part(context: TaskContext) -> TaskOutput:
    """Measure the negative log-likelihoods of one share of the windows."""
    config: PartNode = context.config
    windows = context.inputs["windows"].tensors["windows"]
    nll_N = _nlls(context, config.of.model, share_of(windows, config.shard, config.shards))
    return TaskOutput(Artifact({"nll": nll_N}, {"window": windows.shape[1]}))


def _nlls(context: TaskContext, config: ModelNode, windows_NT: Tensor) -> Tensor:
    """Return the negative log-likelihood of each window, with one block held at a time."""
    model = LoadedModel.from_artifact(context.inputs["load"])
    if config.variant == "full_precision":
        original = read_ends(checkpoint_at(config.path, model.index), model.family)
        context.traffic.read += sum(part.nbytes for part in (original.embedding, original.gain, original.head))
        dtype = torch_dtype(config.dtype)
        ends = Ends(*(part.to(dtype) for part in (original.embedding, original.gain, original.head)))
        blocks = _original_blocks(context, config, model)
    else:
        ends = model_ends(context.inputs["ends"], model)
        blocks = _quantized_blocks(context, config, model)
    return block_nlls(
        blocks,
        ends,
        model.config.rms_norm_eps,
        windows_NT,
        device=context.device,
        batch_tokens=BATCH_TOKENS // context.parts,
    )


def _original_blocks(context: TaskContext, config: ModelNode, model: LoadedModel) -> Iterator[tuple[Block, None]]:
    checkpoint, dtype = checkpoint_at(config.path, model.index), torch_dtype(config.dtype)
    shapes, transforms = block_shapes(model.config, 0), OnlineTransforms(r3=False, r4=False)
    for index in range(model.num_blocks):
        stored = checkpoint.read_block(model.family, index, shapes)
        context.traffic.read += sum(weight.nbytes for weight in stored.values())
        weights = {name: weight.to(dtype) for name, weight in stored.items()}
        block = Block(
            model.config, model.family, index, weights, transforms=transforms, quantize=None, device=context.device
        )
        yield block, None


def _quantized_blocks(context: TaskContext, config: ModelNode, model: LoadedModel) -> Iterator[tuple[Block, Any]]:
    assert config.quantize is not None
    assert config.transforms is not None
    prefix = prefix_tensors(context.inputs["prefix"])
    devices = [context.device] * model.num_blocks
    for index, (weights, sites) in enumerate(_stored_blocks(context, config, model, devices)):
        block = Block(
            model.config,
            model.family,
            index,
            weights,
            transforms=config.transforms,
            quantize=config.quantize,
            device=context.device,
        )
        load_sites(block.sites, sites, context.device)
        yield block, block_prefix(prefix, index, context.device)


def _stored_blocks(
    context: TaskContext, config: ModelNode, model: LoadedModel, devices: list[torch.device]
) -> Iterator[tuple[dict[str, Tensor], Sites]]:
    """Give the weights and sites of each quantized block, unpacked on its device, where that is fast."""
    assert config.quantize is not None
    shapes, dtype = block_shapes(model.config, 0), torch_dtype(config.dtype)
    for index, artifact in enumerate(context.inputs["blocks"]):
        tensors = {name: tensor.to(devices[index]) for name, tensor in artifact.tensors.items()}
        yield block_weights(tensors, shapes, model.family, index, config.quantize.weights, dtype)


def run_requests(context: TaskContext) -> TaskOutput:
    """Read a task of lm-eval and build all that it asks: once, for every model and every part."""
    config: RequestsNode = context.config
    requests = build_requests(config.harness, _path(config.folder))
    content = json.dumps([asdict(request) for request in requests]).encode()
    return TaskOutput(Artifact(files={REQUESTS: content}), metrics={"requests": len(requests)})


def _requests(context: TaskContext) -> list[Request]:
    return [Request(**each) for each in json.loads(context.inputs["requests"].files[REQUESTS])]


def run_harness(context: TaskContext) -> TaskOutput:
    """Answer a task of lm-eval, or take the answers of the parts, and score them."""
    config: HarnessNode = context.config
    requests = _requests(context)
    if "parts" in context.inputs:
        parts = [json.loads(part.files[ANSWERS]) for part in context.inputs["parts"]]
        answers = {int(index): each for part in parts for index, each in part.items()}
    else:
        answers = _answers(context, config, requests, 0, 1)
    results = score(config.harness, requests, answers, _path(config.folder))
    metrics = {name: value for each in results[:1] for name, value in each["metrics"].items()}
    return TaskOutput(Artifact(record={"results": results}, files={ANSWERS: _json(answers)}), metrics=metrics)


def run_harness_part(context: TaskContext) -> TaskOutput:
    """Answer one share of the requests."""
    config: PartNode = context.config
    assert isinstance(config.of, HarnessNode)
    answers = _answers(context, config.of, _requests(context), config.shard, config.shards)
    return TaskOutput(Artifact(files={ANSWERS: _json(answers)}))


def _json(answers: dict[int, Answer]) -> bytes:
    return json.dumps(answers).encode()


def _path(folder: str | None) -> Path | None:
    return None if folder is None else Path(folder)


def _answers(
    context: TaskContext, config: HarnessNode, requests: list[Request], shard: int, shards: int
) -> dict[int, Answer]:
    if not any(True for _ in chunks_of(requests, shard, shards)):
        return {}  # more parts than chunks: no reason to load a model
    from prefixquant.tasks.harness_model import PrefixModel  # takes seconds to import

    model = LoadedModel.from_artifact(context.inputs["load"])
    devices = _devices(context, config.gpus)
    if config.model.variant == "full_precision":
        served = PrefixModel(load_original(config.model.path, config.model.dtype, devices), model.tokenizer())
    else:
        token_ids = context.inputs["prefix"].record["token_ids"]
        served = PrefixModel(_whole_quantized(context, config.model, model, devices), model.tokenizer(), token_ids)
    return answer(served, requests, shard, shards)


def _devices(context: TaskContext, gpus: int) -> list[torch.device]:
    """Return the GPUs that this task got, or the CPU."""
    if context.device.type != "cuda":
        return [context.device]
    return [torch.device("cuda", index) for index in range(min(gpus, torch.cuda.device_count()))]


def _whole_quantized(context: TaskContext, config: ModelNode, model: LoadedModel, devices: list[torch.device]) -> Any:
    assert config.quantize is not None
    assert config.transforms is not None
    untied = copy.deepcopy(model.config)
    untied.tie_word_embeddings = False  # rotated, embedding and head differ
    placed = device_map(model.family, model.num_blocks, devices)
    on = [placed[f"{model.family.blocks}.{index}"] for index in range(model.num_blocks)]
    return build_model(
        untied,
        model.family,
        _stored_blocks(context, config, model, on),
        model_ends(context.inputs["ends"], model),
        prefix_tensors(context.inputs["prefix"]),
        quantize=config.quantize,
        transforms=config.transforms,
        devices=devices,
    )


EVALUATE = Task(name="evaluate", version=2, run=run_evaluate)
EVALUATE_PART = Task(name="evaluate_part", version=1, run=run_evaluate_part, ephemeral=True)
REQUESTS_TASK = Task(name="requests", version=1, run=run_requests)
HARNESS = Task(name="tasks", version=1, run=run_harness)
HARNESS_PART = Task(name="tasks_part", version=1, run=run_harness_part, ephemeral=True)
