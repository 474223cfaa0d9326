"""The tasks of block-wise training: a run over consecutive blocks, and the trained blocks that it yields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixquant.pipeline.checkpoints import StoredCheckpoints
from prefixquant.pipeline.graph import Task
from prefixquant.pipeline.stages import read_ends_artifact, read_prefix
from prefixquant.pipeline.worker import TaskContext, TaskOutput
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.gptq import GptqConfig
from prefixquant.tasks.load import LoadedModel, torch_dtype
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.parallel import Ranks
from prefixquant.tasks.train_block import Epoch
from prefixquant.tasks.train_chain import Chain, train_chain
from prefixquant.tasks.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainNode:
    """Which blocks are trained, and how."""

    first: int
    stop: int
    """Block before which it ends."""

    transforms: OnlineTransforms
    quantize: QuantizeConfig
    train: TrainConfig
    gptq: GptqConfig | None
    """How trained weights are rounded; None: to nearest."""

    from_rounded: bool
    """Start from the weights as they were rounded before, not from those in full precision."""

    dtype: str
    seed: int
    """Of the order of the batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedNode:
    """Which trained block."""

    block: int


def run_train(context: TaskContext) -> TaskOutput:
    """Train consecutive blocks, each published as soon as it is done; those that are stored are not trained again."""
    config: TrainNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    dtype = torch_dtype(config.dtype)
    chain = Chain(
        config=model.config,
        family=model.family,
        transforms=config.transforms,
        quantize=config.quantize,
        dtype=dtype,
        prefix=read_prefix(context.inputs["prefix"]),
        device=context.device,
    )
    store = _ChainStore(context)
    validates = "validation" in context.inputs
    epochs = config.train.epochs
    name = "polish" if config.from_rounded and "trained" in context.inputs else "train"

    def on_epoch(epoch: Epoch) -> None:
        context.post(_text(epoch, epochs), _metrics(epoch, "train"), epoch.block * epochs + epoch.epoch)

    train_chain(
        chain,
        store,
        config.first,
        config.stop,
        read_ends_artifact(context.inputs["ends"], model),
        context.inputs["windows"].tensors["windows"],
        context.inputs["validation"].tensors["windows"] if validates else None,
        config.train,
        context.ranks,
        seed=config.seed,
        from_rounded=config.from_rounded,
        gptq=config.gptq,
        on_epoch=on_epoch,
    )
    return TaskOutput(Artifact(record={"first": config.first, "stop": config.stop}))
