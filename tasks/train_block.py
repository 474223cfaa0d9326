"""Train one block to reproduce its full-precision self (PrefixQuant, arXiv:2410.05265, section 5).

Scales, zero points, clipping ratios, norm gains and weights are trained by AdamW through straight-through estimators.
Letters: N sequences of this rank, B of a batch, T tokens, D hidden.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prefixquant.tasks.errors import ConfigError, NumericalError
from prefixquant.tasks.model.block import Block, Prefix
from prefixquant.tasks.model.trainable import Trainable
from prefixquant.tasks.parallel import ParameterGroup, Ranks, Stepper
from prefixquant.tasks.streams import Stream, batches
from prefixquant.tasks.train_config import TrainConfig

FORWARD_TOKENS = 16384
"""Tokens of a forward of the validation loss, which needs no memory for gradients."""

EXPLOSION = 10.0
"""An epoch whose mean training loss is so many times the loss before training has exploded."""

COMPILED_WIDTH = 2048
"""Hidden size from which torch.compile is the default."""

POSITIVE = ("scale", "clip_ratio")
"""How the names of parameters end that mean nothing at or below zero."""


@dataclass(frozen=True, slots=True)
class BlockData:
    """What a block is trained on: streams of equal length, one or two of them targets."""

    inputs: Stream
    targets: tuple[Stream, ...]


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch measured."""

    block: int
    epoch: int
    """From 1."""

    train_loss: float
    """Mean over its steps, each before its update."""

    validation_loss: float | None
    """After the epoch; None without validation sequences."""

    gradient_norm: float
    """Mean over its steps, before clipping."""

    seconds: float
    """Wall clock, validation included."""

    peak_device_bytes: int
    """Largest GPU memory held by tensors so far in this block; 0 on CPU."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How the training of a block went; the block itself holds the parameters of the best epoch."""

    loss_before: float
    """Validation loss (training loss without validation sequences) of the block as it came from the search."""

    loss_after: float
    """The same of the parameters that are kept."""

    best_epoch: int
    """Their epoch; 0: training did not help and the block is as it came."""

    epochs: tuple[Epoch, ...]
    """All that were run in the attempt that counts."""

    learning_rate_factor: float
    """1, or 0.5 if the first attempt diverged."""

    divergence: str
    """Where the first attempt diverged; empty if it did not."""

    def record(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


class Checkpoints(Protocol):
    """Keeps the state of an unfinished block where a restarted worker finds it."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest state, tensors and record, or None."""

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the state."""

    def due(self) -> bool:
        """Return whether it is time for another one; the same on every rank."""


class NoCheckpoints:
    """Keeps nothing."""

    def load(self) -> None:
        """Return None."""

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def due(self) -> bool:
        """Return False."""
        return False


class BlockLoss(nn.Module):
    """A block, the full-precision blocks between its output and the loss, and the loss as one module."""

    def __init__(
        self,
        block: Block,
        prefix: Prefix | None,
        loss: Callable[[Tensor, Tensor], Tensor],
        following: Sequence[Callable[[Tensor], Tensor]] = (),
        *,
        compiled: bool = False,
    ) -> None:
        """With `compiled`, forwards that record gradients go through torch.compile, with one graph for all blocks."""
        super().__init__()
        self.block = block
        self.prefix = prefix
        self.loss = loss
        self.following = tuple(following)  # a plain tuple: what is frozen is no parameter of this module
        self._compiled = torch.compile(self._loss, dynamic=False) if compiled else None

    def forward(self, input_BTD: Tensor, *targets_BTD: Tensor) -> Tensor:
        """Return the loss, averaged over the targets: a float32 scalar."""
        if self._compiled is None or not torch.is_grad_enabled():  # validation, in other batches, compiles nothing
            return self._loss(input_BTD, *targets_BTD)
        with self.block.weights_on_grid():
            loss: Tensor = self._compiled(input_BTD, *targets_BTD)
        return loss

    def _loss(self, input_BTD: Tensor, *targets_BTD: Tensor) -> Tensor:
        output = self.block(input_BTD.float(), self.prefix)
        for function in self.following:
            output = function(output)
        return torch.stack([self.loss(output, target) for target in targets_BTD]).mean()


class _Diverged(Exception):  # noqa: N818 - caught within this module
    """A loss was not finite, or exploded; the message says where."""


@dataclass
class _Progress:
    """What the epochs so far have found; with the parameters it is what a checkpoint holds."""

    loss_before: float = math.nan
    best_loss: float = math.inf
    best_epoch: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    factor: float = 1.0
    divergence: str = ""


def train_block(
    block: Block,
    trainables: Sequence[Trainable],
    train: BlockData,
    validation: BlockData | None,
    prefix: Prefix | None,
    config: TrainConfig,
    ranks: Ranks,
    *,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    following: Sequence[Callable[[Tensor], Tensor]] = (),
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_divergence: Callable[[int, str], None] = lambda block, where: None,
    checkpoints: Checkpoints | None = None,
) -> TrainResult:
    """Train a block in place and return how it went; it is left with the parameters of the best epoch.

    A loss that is not finite or explodes ends the attempt; a second one starts over at half the learning rates.

    Args:
        block: trainable, on its device.
        trainables: its parameters, from `make_trainable`.
        train: this rank's share of the training streams: of every batch of `config.batch_size` sequences in turn the
            rank's consecutive part.
        validation: likewise; None: the training loss decides.
        prefix: keys and values of the prefix in this block.
        config: how to train.
        ranks: the processes that train together. Their number changes the result by floating-point order alone.
        seed: of the order of the batches.
        loss: distance between the output and a target.
        following: what the output passes, unchanged by training, before it meets the target.
        on_epoch: called after each epoch.
        on_divergence: called with block and place when an attempt has diverged and another one begins.
        checkpoints: where the state goes after an epoch, and where an earlier worker left it.

    Raises:
        ConfigError: `config.compile` is `always` and the ranks' steppers do not go with it.
        NumericalError: the second attempt diverged as well; names block, epoch and step.
    """
    compiled = _compiles(config, ranks, train.inputs)
    start = {each.name: each.parameter.detach().cpu().clone() for each in trainables}
    factor, divergence = 1.0, ""
    while True:
        module = BlockLoss(block, prefix, loss, following, compiled=compiled)
        run = _Training(module, trainables, train, validation, config, ranks, seed, factor, on_epoch)
        try:
            return run.run(checkpoints or NoCheckpoints(), divergence)
        except _Diverged as err:
            if run.progress.factor < 1:
                raise NumericalError(
                    f"block {block.index}: {err}, after a first attempt at twice the learning rates diverged as well "
                    f"({run.progress.divergence}); lower train.scale_learning_rate and train.weight_learning_rate"
                ) from None
            factor, divergence = 0.5, str(err)
            on_divergence(block.index, divergence)
            with ranks.whole(run.module):
                _write(trainables, start)


def _compiles(config: TrainConfig, ranks: Ranks, inputs: Stream) -> bool:
    """Return whether the training steps go through torch.compile."""
    if config.compile == "always" and not ranks.compiles:
        raise ConfigError("train.compile=always does not go with train.sharding=zero; set it to auto or never")
    if config.compile != "auto":
        return config.compile == "always"
    return inputs.device.type == "cuda" and ranks.compiles and inputs.data.shape[-1] >= COMPILED_WIDTH


class _Training:
    """One attempt."""

    def __init__(
        self,
        module: BlockLoss,
        trainables: Sequence[Trainable],
        train: BlockData,
        validation: BlockData | None,
        config: TrainConfig,
        ranks: Ranks,
        seed: int,
        factor: float,
        on_epoch: Callable[[Epoch], None],
    ) -> None:
        self.module, self.trainables, self.config, self.ranks, self.seed = module, trainables, config, ranks, seed
        self.train, self.validation, self.on_epoch = train, validation, on_epoch
        self.batch = config.batch_size // ranks.size
        self.steps = len(train.inputs) // self.batch
        self.trained = [each for each in trainables if self._rate(each) > 0]
        for each in trainables:
            each.parameter.requires_grad_(self._rate(each) > 0)
        self.progress = _Progress(factor=factor)

    def _rate(self, each: Trainable) -> float:
        config = self.config
        rate = config.weight_learning_rate if each.is_weight else config.scale_learning_rate
        return rate * (each.step if config.relative_learning_rates else 1.0)

    def run(self, checkpoints: Checkpoints, divergence: str) -> TrainResult:
        """Train and return how it went. Raises _Diverged."""
        progress = self.progress
        stepper = self._stepper()
        best: dict[str, Tensor] = {}
        found = checkpoints.load()
        if found is not None and found[1]["factor"] <= progress.factor:
            best = self._restore(*found, stepper)
            progress = self.progress
        else:
            progress.divergence = divergence
            progress.loss_before = progress.best_loss = self._loss(self.validation or self.train)
            if not math.isfinite(progress.loss_before):
                raise NumericalError(
                    f"block {self.module.block.index}: before training the loss is {progress.loss_before}; "
                    "the block that training starts from, or what enters it, is broken"
                )
            best = self._parameters()
        while not self._finished():
            epoch = self._epoch(len(progress.epochs) + 1, stepper)
            progress.epochs.append(epoch)
            decisive = epoch.train_loss if epoch.validation_loss is None else epoch.validation_loss
            if decisive < progress.best_loss:
                progress.best_loss, progress.best_epoch = decisive, epoch.epoch
                best = self._parameters()
            self.on_epoch(epoch)
            if checkpoints.due() and not self._finished():
                self._save(checkpoints, stepper, best)
        with self.ranks.whole(self.module):
            _write(self.trainables, best)
        for each in self.trainables:
            each.parameter.requires_grad_(False)
        return TrainResult(
            loss_before=progress.loss_before,
            loss_after=progress.best_loss,
            best_epoch=progress.best_epoch,
            epochs=tuple(progress.epochs),
            learning_rate_factor=progress.factor,
            divergence=progress.divergence,
        )

    def _finished(self) -> bool:
        done, patience = len(self.progress.epochs), self.config.early_stop_epochs
        stale = done - self.progress.best_epoch
        return done >= self.config.epochs or (patience is not None and stale >= patience)

    def _stepper(self) -> Stepper:
        decay = self.config.weight_decay
        groups = [ParameterGroup([each.parameter], decay if each.is_weight else 0.0) for each in self.trained]
        clip, precision = self.config.gradient_clip, self.config.precision
        return self.ranks.stepper(self.module, groups, gradient_clip=clip, precision=precision)

    def _epoch(self, epoch: int, stepper: Stepper) -> Epoch:
        start = time.perf_counter()
        device = self.train.inputs.device
        losses = torch.empty(self.steps, device=device)
        norms = torch.empty(self.steps, device=device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.steps, generator=generator).tolist()
        streams = [self.train.inputs, *self.train.targets]
        for step, batch in enumerate(batches(streams, [index * self.batch for index in order], self.batch)):
            stepper.set_learning_rates(self._rates((epoch - 1) * self.steps + step))
            losses[step], norms[step] = stepper.step(*batch)
        self._check_steps(losses.tolist(), epoch)
        validation = None if self.validation is None else self._loss(self.validation)
        if validation is not None:
            self._check(validation, f"validation after epoch {epoch}")
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return Epoch(
            block=self.module.block.index,
            epoch=epoch,
            train_loss=float(losses.mean()),
            validation_loss=validation,
            gradient_norm=float(norms.mean()),
            seconds=time.perf_counter() - start,
            peak_device_bytes=peak,
        )

    def _rates(self, step: int) -> list[float]:
        """Return the learning rate of each trained parameter at a step: a cosine from the first to the last."""
        config = self.config
        last = max(1, config.epochs * self.steps - 1)
        low = config.min_learning_rate_ratio
        cosine = low + (1 - low) * (1 + math.cos(math.pi * min(step, last) / last)) / 2
        constant = config.constant_weight_learning_rate
        return [
            self.progress.factor * self._rate(each) * (1.0 if each.is_weight and constant else cosine)
            for each in self.trained
        ]

    def _loss(self, data: BlockData) -> float:
        return mean_loss(self.module, data, self.config, self.ranks)

    def _check_steps(self, losses: list[float], epoch: int) -> None:
        for step, loss in enumerate(losses, start=1):
            self._check(loss, f"epoch {epoch}, step {step} of {self.steps}")
        mean = sum(losses) / len(losses)
        if mean > EXPLOSION * self.progress.loss_before:
            worst = max(range(len(losses)), key=losses.__getitem__) + 1
            raise _Diverged(
                f"epoch {epoch}: the loss exploded from {self.progress.loss_before:.4g} to {mean:.4g} "
                f"(largest at step {worst} of {self.steps})"
            )
        with self.ranks.whole(self.module):
            lowest = {
                each.name: float(each.parameter.detach().min()) for each in self.trained if each.name.endswith(POSITIVE)
            }
        for name, low in lowest.items():
            if low <= 0:
                raise _Diverged(f"epoch {epoch}: {name} fell to {low:.4g}")

    def _check(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise _Diverged(f"{where}: the loss is {loss}")

    def _parameters(self) -> dict[str, Tensor]:
        """Return copies of the parameters, on their device."""
        with self.ranks.whole(self.module):
            return {each.name: each.parameter.detach().clone() for each in self.trained}

    def _save(self, checkpoints: Checkpoints, stepper: Stepper, best: Mapping[str, Tensor]) -> None:
        tensors = {f"optimizer.{name}": tensor for name, tensor in stepper.state_dict().items()}
        tensors |= {f"now.{name}": tensor for name, tensor in self._parameters().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
        checkpoints.save(tensors, asdict(self.progress))

    def _restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], stepper: Stepper) -> dict[str, Tensor]:
        """Go on from a checkpoint and return the best parameters so far."""
        progress = _Progress(**(dict(record) | {"epochs": [Epoch(**each) for each in record["epochs"]]}))
        self.progress = progress
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "now": {}, "best": {}}
        for name, tensor in tensors.items():
            part, _, inner = name.partition(".")
            parts[part][inner] = tensor
        with self.ranks.whole(self.module):
            _write(self.trainables, parts["now"])
        stepper.load_state_dict(parts["optimizer"])
        device = self.train.inputs.device
        return {name: tensor.to(device) for name, tensor in parts["best"].items()}


@torch.no_grad()
def mean_loss(module: BlockLoss, data: BlockData, config: TrainConfig, ranks: Ranks) -> float:
    """Return the mean loss over the data of all ranks, in the precision of training."""
    device = data.inputs.device
    count, length = data.inputs.data.shape[:2]
    # Equal parts, as large as may be: on a small model the launches of a forward take longer than its arithmetic.
    most = max(1, FORWARD_TOKENS // ranks.parts // length)
    size = max(each for each in range(1, most + 1) if count % each == 0)
    starts = range(0, count, size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with autocast(device, config.precision):
        for batch in batches([data.inputs, *data.targets], starts, size):
            total += module(*batch)
    return float(ranks.mean(total / len(starts)))


@torch.no_grad()
def _write(trainables: Sequence[Trainable], values: Mapping[str, Tensor]) -> None:
    for each in trainables:
        if each.name in values:
            each.parameter.copy_(values[each.name])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision: bf16, fp16, or fp32 for none."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
