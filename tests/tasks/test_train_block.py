import math
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

from prefixquant.tasks.calibrate import CalibrateConfig, calibrate_blocks
from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.losses import LOSSES, mse
from prefixquant.tasks.model.block import Block
from prefixquant.tasks.model.sites import OnlineTransforms, head_size
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.model.trainable import make_trainable
from prefixquant.tasks.quantize_block import quantize_block
from prefixquant.tasks.rotate import RotateConfig, rotate_block
from prefixquant.tasks.search import SearchConfig
from prefixquant.tasks.steps import SingleRank
from prefixquant.tasks.streams import Stream
from prefixquant.tasks.train_block import BlockData, BlockLoss, mean_loss, train_block
from prefixquant.tasks.train_config import TrainConfig

NAMES = ("weights", "activations", "keys", "values")
TOKEN = ActivationSpec(mode="dynamic", granularity="token")
HEADS = KeyValueSpec(mode="dynamic", before_rope=True)
CASES = {
    "static": QuantizeConfig(),
    "dynamic": QuantizeConfig(activations=TOKEN, keys=HEADS, values=KeyValueSpec(mode="dynamic")),
    "asymmetric": QuantizeConfig(
        weights=WeightSpec(symmetric=False),
        activations=ActivationSpec(symmetric=False),
        keys=KeyValueSpec(symmetric=False),
        values=KeyValueSpec(symmetric=False),
    ),
    "w2-groups": QuantizeConfig(
        weights=WeightSpec(bits=2, symmetric=False, granularity="group", group_size=16),
        activations=None,
        keys=None,
        values=None,
    ),
}
CONFIG = TrainConfig(
    epochs=4,
    sequences=96,
    validation_sequences=32,
    sequence_length=10,
    batch_size=4,
    relative_learning_rates=True,
    scale_learning_rate=1e-2,
    weight_learning_rate=2e-2,
    precision="fp32",
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Problem:
    """A searched tiny block, ready to be trained, with its streams."""

    def __init__(self, quantize=CASES["static"], prefixed=True, variant="llama-biases"):
        model = tiny.tiny_variant(variant)
        original = tiny.build_blocks(model, RotateConfig(), QuantizeConfig(**dict.fromkeys(NAMES)))[0]
        blocks = tiny.build_blocks(model, RotateConfig(), quantize)[:1]
        self.block = blocks[0]
        stream = random(128, 10, 8) @ random(8, 48, seed=1) + 0.3 * random(128, 10, 48, seed=2)
        heads, channels = model.config.num_key_value_heads, original.layer.self_attn.head_dim
        self.prefix = (random(heads, 3, channels), random(heads, 3, channels, seed=1)) if prefixed else None
        whole = None if self.prefix is None else tuple(part.unsqueeze(0) for part in self.prefix)
        ranges = calibrate_blocks(blocks, whole, stream, CalibrateConfig(), batch_size=32, device=tiny.CPU)[0]
        weights = {role: self.block.linear(role).weight.data.clone() for role in self.block.family.linears}
        search = SearchConfig(coarse_points=3, fine_points=0, weight_points=6)
        result = quantize_block(self.block, ranges, stream, self.prefix, quantize.weights, search, batch_size=32)
        self.trainables = make_trainable(self.block, weights, result.weights, quantize.weights)
        with torch.no_grad():
            target = original(stream, self.prefix)
        self.train, self.validation = (
            BlockData(Stream(stream[part], tiny.CPU), (Stream(target[part], tiny.CPU),))
            for part in (slice(0, 96), slice(96, 128))
        )

    def run(self, config=CONFIG, ranks=None, loss=mse, **options):
        options = {"validation": self.validation, "seed": 1} | options
        validation, seed = options.pop("validation"), options.pop("seed")
        return train_block(
            self.block,
            self.trainables,
            options.pop("train", self.train),
            validation,
            self.prefix,
            config,
            ranks or SingleRank(),
            seed=seed,
            loss=loss,
            **options,
        )

    def values(self):
        return {each.name: each.parameter.detach().clone() for each in self.trainables}


class Memory:
    """Keeps checkpoints in memory, one after every epoch."""

    def __init__(self, start=None):
        self.saved = [] if start is None else [start]

    def load(self):
        return self.saved[-1] if self.saved else None

    def save(self, tensors, record):
        self.saved.append(({name: tensor.clone() for name, tensor in tensors.items()}, dict(record)))

    def due(self):
        return True


@pytest.mark.parametrize("prefixed", [True, False], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("quantize", CASES.values(), ids=CASES.keys())
def test_training_lowers_the_loss_and_keeps_the_best_epoch(quantize, prefixed):
    problem = Problem(quantize, prefixed)
    result = problem.run()
    assert result.loss_after < 0.95 * result.loss_before
    losses = [epoch.validation_loss for epoch in result.epochs]
    assert result.loss_after == min(losses) == losses[result.best_epoch - 1]
    module = BlockLoss(problem.block, problem.prefix, mse)
    assert mean_loss(module, problem.validation, CONFIG, SingleRank()) == result.loss_after  # measured anew
    assert not any(each.parameter.requires_grad for each in problem.trainables)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_lowered(name):
    result = Problem().run(loss=LOSSES[name])
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_lowers_the_loss_too(precision):
    result = Problem().run(replace(CONFIG, precision=precision))
    assert result.loss_after < 0.95 * result.loss_before
    assert result.divergence == ""


def test_a_second_target_and_blocks_behind_count():
    problem = Problem()
    other = Stream(problem.train.targets[0].data + 0.5, tiny.CPU)
    both = BlockData(problem.train.inputs, (*problem.train.targets, other))
    between = problem.run(train=both, validation=None, seed=2)
    assert between.loss_before >= 0.125  # half of 0.5 ** 2: no output is near both
    linear = nn.Linear(48, 48).requires_grad_(False)
    problem = Problem()
    problem.train = replace(problem.train, targets=(Stream(linear(problem.train.targets[0].data), tiny.CPU),))
    behind = problem.run(following=[linear], validation=None)
    assert behind.loss_after < behind.loss_before
    assert all(each.grad is None for each in linear.parameters())


def test_a_rate_of_zero_freezes_the_weights():
    problem = Problem()
    before = problem.values()
    problem.run(replace(CONFIG, weight_learning_rate=0.0))
    after = problem.values()
    for each in problem.trainables:
        assert torch.equal(after[each.name], before[each.name]) == each.is_weight


def test_training_that_does_not_help_leaves_the_block_as_it_came():
    problem = Problem()
    before = problem.values()
    result = problem.run(replace(CONFIG, scale_learning_rate=1e-12, weight_learning_rate=0.3, epochs=1))
    assert result.best_epoch == 0
    assert result.loss_after == result.loss_before
    for name, value in problem.values().items():
        assert torch.equal(value, before[name])


def test_early_stopping_ends_after_epochs_without_a_better_one():
    config = replace(CONFIG, epochs=30, early_stop_epochs=2, weight_learning_rate=0.3)
    result = Problem().run(config)
    assert len(result.epochs) == result.best_epoch + 2 < 30


def test_clipping_limits_what_a_step_changes():
    # AdamW's step does not depend on the size of the gradient: compare the moments that it keeps of it.
    found = {}
    for clip in (None, 1e-3):
        memory = Memory()
        config = replace(CONFIG, gradient_clip=clip, batch_size=32, epochs=2)
        result = Problem().run(config, checkpoints=memory)
        moments = {name: value for name, value in memory.saved[0][0].items() if name.endswith(".exp_avg")}
        found[clip] = math.sqrt(sum(float(each.square().sum()) for each in moments.values()))
        assert result.epochs[0].gradient_norm > 1e-2  # before clipping
    assert found[1e-3] <= 1e-3 * (1 - 0.9**3) * 1.001  # three steps of at most 1e-3, averaged with beta 0.9
    assert found[None] > 5 * found[1e-3]


def test_a_loss_that_explodes_is_tried_once_more_at_half_the_rates():
    problem, calls = Problem(), []

    def loss(output, target):
        calls.append(None)
        bad = len(calls) == 40  # in the second epoch of the first attempt
        return mse(output, target) * (torch.nan if bad else 1.0)

    said = []
    result = problem.run(loss=loss, on_divergence=lambda block, where: said.append((block, where)))
    assert said == [(0, result.divergence)]
    assert result.learning_rate_factor == 0.5
    assert "the loss is nan" in result.divergence
    assert len(result.epochs) == CONFIG.epochs
    assert result.loss_after < result.loss_before


def test_two_attempts_that_explode_name_block_epoch_and_step():
    with pytest.raises(
        NumericalError, match=r"block 0: epoch 1.*the loss exploded.*first attempt.*epoch 1.*lower train"
    ):
        Problem().run(replace(CONFIG, weight_learning_rate=1e4, gradient_clip=None))
    broken = Problem()
    broken.train.targets[0].data[4:] = torch.nan  # all but the first batch
    with pytest.raises(NumericalError, match=r"epoch 1, step [12] of 24: the loss is nan"):
        broken.run()


def test_a_block_that_is_broken_before_training_is_no_matter_of_rates():
    problem = Problem()
    problem.validation.inputs.data[0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="block 0: before training the loss is nan"):
        problem.run()


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(epoch):
    memory = Memory()
    undisturbed = Problem()
    result = undisturbed.run(checkpoints=memory)
    assert [record["epochs"][-1]["epoch"] for _, record in memory.saved] == [1, 2, 3]  # none after the last
    resumed, seen = Problem(), []
    again = resumed.run(checkpoints=Memory(memory.saved[epoch - 1]), on_epoch=seen.append)
    assert [each.epoch for each in seen] == list(range(epoch + 1, CONFIG.epochs + 1))
    untimed = partial(replace, seconds=0.0)
    assert [untimed(each) for each in again.epochs] == [untimed(each) for each in result.epochs]
    assert (again.best_epoch, again.loss_before, again.loss_after) == (
        result.best_epoch,
        result.loss_before,
        result.loss_after,
    )
    wanted = undisturbed.values()
    for name, value in resumed.values().items():
        assert torch.equal(value, wanted[name])


def test_a_checkpoint_of_the_second_attempt_is_not_lost():
    memory, calls = Memory(), []

    def loss(output, target):
        calls.append(None)
        return mse(output, target) * (torch.nan if len(calls) == 40 else 1.0)

    result = Problem().run(loss=loss, checkpoints=memory)
    assert result.learning_rate_factor == 0.5
    again = Problem().run(checkpoints=Memory(memory.saved[-1]))
    assert again.learning_rate_factor == 0.5
    assert again.divergence == result.divergence
    assert again.loss_after == result.loss_after


@pytest.mark.real_model
def test_training_lowers_the_loss_of_a_real_block_on_tokens_it_did_not_see(smollm2_model: PreTrainedModel):
    config, family, rotate = smollm2_model.config, tiny.family_of(smollm2_model), RotateConfig()
    weights = tiny.block_weights(smollm2_model, 0)
    weights = rotate_block(weights, family, head_size(config), 0, rotate, dtype=torch.float32, device=tiny.CPU)
    transforms, quantize = OnlineTransforms(r3=rotate.r3, r4=rotate.r4), QuantizeConfig()
    block = Block(config, family, 0, weights, transforms=transforms, quantize=quantize, device=tiny.CPU)
    embedding = tiny.build_ends(smollm2_model, rotate).embedding
    _, prefix = block.prefix_states(embedding[[260, 216, 1]].unsqueeze(0))
    ids = torch.randint(config.vocab_size, (24, 64), generator=torch.Generator().manual_seed(0))
    stream = embedding[ids]
    with block.only():
        target = block(stream, prefix)
    train, unseen = (
        BlockData(Stream(stream[part], tiny.CPU), (Stream(target[part], tiny.CPU),))
        for part in (slice(0, 16), slice(16, 24))
    )
    whole = (prefix[0].unsqueeze(0), prefix[1].unsqueeze(0))
    ranges = calibrate_blocks([block], whole, stream[:16], CalibrateConfig(), batch_size=8, device=tiny.CPU)[0]
    originals = {role: weights[f"{role}.weight"].clone() for role in family.linears}
    found = quantize_block(block, ranges, stream[:16], prefix, quantize.weights, None, batch_size=8)
    trainables = make_trainable(block, originals, found.weights, quantize.weights)
    config = replace(CONFIG, epochs=2, scale_learning_rate=1e-3, weight_learning_rate=1e-2)
    result = train_block(block, trainables, train, unseen, prefix, config, SingleRank(), seed=0, loss=mse)
    assert result.loss_after < 0.9 * result.loss_before
