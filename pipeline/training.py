"""The tasks of block-wise training: a run over consecutive blocks, and the trained blocks that it yields."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prefixquant.pipeline.checkpoints import StoredCheckpoints
from prefixquant.pipeline.graph import Task
from prefixquant.pipeline.stages import model_ends, prefix_tensors
from prefixquant.pipeline.worker import TaskContext, TaskOutput
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.gptq import GptqConfig
from prefixquant.tasks.load import LoadedModel, torch_dtype
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
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
    """Whether it starts from the rounded weights, or how the trained ones are rounded; None: neither."""

    dtype: str
    seed: int
    """Of the order of the batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedNode:
    """Which trained block."""

    block: int


class _ChainStore:
    """Blocks between the chain and the store."""

    def __init__(self, context: TaskContext) -> None:
        assert context.products is not None
        self._context, self._products, self._inputs = context, context.products, context.inputs
        self._config: TrainNode = context.config
        self._checkpoints: dict[int, StoredCheckpoints] = {}

    def rotated(self, block: int) -> Mapping[str, Tensor]:
        """Return a full-precision block's weights."""
        tensors: dict[str, Tensor] = self._inputs["rotated"][block].tensors
        return tensors

    def searched(self, block: int) -> Mapping[str, Tensor]:
        """Return the stored block from which training starts."""
        tensors: dict[str, Tensor] = self._inputs["searched"][block - self._config.first].tensors
        return tensors

    def finished(self, block: int) -> Mapping[str, Tensor] | None:
        """Return the trained block if all ranks find it."""
        found, ranks = self._products.load(str(block)), self._context.ranks
        if ranks.size > 1:
            there = torch.tensor(float(found is not None), device=self._context.device)
            if float(ranks.mean(there)) < 1:
                return None
        return None if found is None else found.tensors

    def publish(self, block: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a trained block; its checkpoints go."""
        searched = list(self._inputs["searched"].records())[block - self._config.first]
        errors = {name: searched[name] for name in ("error", "error_before_search")}
        epochs = record["epochs"]
        metrics = {name: record[name] for name in ("loss_before", "loss_after", "best_epoch", "learning_rate_factor")}
        metrics["seconds"] = sum(each["seconds"] for each in epochs)
        kept = {**errors, **record, "epochs": [_storable(each) for each in epochs]}
        self._products.publish(str(block), Artifact(tensors, kept), metrics)
        self._checkpoints[block].clear()

    def checkpoints(self, block: int) -> StoredCheckpoints:
        """Return where the state of a block under training goes."""
        train = self._config.train
        self._checkpoints[block] = StoredCheckpoints(
            self._products.store,
            self._products.key(str(block)),
            epochs=train.epochs,
            seconds=train.checkpoint_seconds,
            ranks=self._context.ranks,
            device=self._context.device,
        )
        return self._checkpoints[block]


def run_train(context: TaskContext) -> TaskOutput:
    """Train consecutive blocks, each published as soon as it is done; those that are stored are not trained again."""
    config: TrainNode = context.config
    model = LoadedModel.from_artifact(context.inputs["load"])
    epochs = config.train.epochs

    def on_epoch(epoch: Epoch) -> None:
        context.post(_text(epoch, epochs), epoch_metrics(asdict(epoch)), epoch_step(epoch.block, epoch.epoch, epochs))

    def on_divergence(block: int, where: str) -> None:
        context.post(f"block {block}: {where}; once more at half the learning rates", {}, epoch_step(block, 1, epochs))

    train_chain(
        Chain(
            config=model.config,
            family=model.family,
            transforms=config.transforms,
            quantize=config.quantize,
            dtype=torch_dtype(config.dtype),
            prefix=prefix_tensors(context.inputs["prefix"]),
            device=context.device,
        ),
        _ChainStore(context),
        config.first,
        config.stop,
        model_ends(context.inputs["ends"], model),
        context.inputs["windows"].tensors["windows"],
        context.inputs["validation"].tensors["windows"] if "validation" in context.inputs else None,
        config.train,
        context.ranks,
        seed=config.seed,
        gptq=config.gptq,
        on_epoch=on_epoch,
        on_divergence=on_divergence,
    )
    return TaskOutput(Artifact(record={"first": config.first, "stop": config.stop}))


def epoch_step(block: int, epoch: int, epochs: int) -> int:
    """Return the step at which the numbers of an epoch, from 1, are tracked."""
    return block * epochs + epoch


def epoch_metrics(epoch: Mapping[str, Any]) -> dict[str, float]:
    """Return what is tracked of an epoch: of what it has, the finite numbers."""
    values = {
        "loss": epoch["train_loss"],
        "validation_loss": epoch["validation_loss"],
        "gradient_norm": epoch["gradient_norm"],
        "epoch_seconds": epoch["seconds"],
        "peak_device_gb": epoch["peak_device_bytes"] / 1e9,
    }
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _storable(epoch: Mapping[str, Any]) -> dict[str, Any]:
    """Return an epoch without infinite numbers, for which JSON has no word; in fp16 a gradient norm may be one."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in epoch.items()}


def _text(epoch: Epoch, epochs: int) -> str:
    validation = "" if epoch.validation_loss is None else f", validation {epoch.validation_loss:.4g}"
    return f"block {epoch.block} epoch {epoch.epoch}/{epochs}: loss {epoch.train_loss:.4g}{validation}"


TRAIN = Task(name="train", version=1, run=run_train)
TRAINED = Task(name="trained", version=1, run=None)
POLISH = Task(name="polish", version=1, run=run_train)
POLISHED = Task(name="polished", version=1, run=None)
