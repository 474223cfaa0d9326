from dataclasses import replace

import pytest
import tiny
import torch

from prefixquant.tasks.calibrate import CalibrateConfig, calibrate_blocks
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.gptq import GptqConfig
from prefixquant.tasks.model.saved import block_tensors
from prefixquant.tasks.model.sites import OnlineTransforms, head_size
from prefixquant.tasks.model.spec import QuantizeConfig, WeightSpec
from prefixquant.tasks.quantize_block import quantize_block
from prefixquant.tasks.rotate import RotateConfig, rotate_block
from prefixquant.tasks.search import SearchConfig
from prefixquant.tasks.steps import SingleRank
from prefixquant.tasks.train_chain import Chain, rank_share, train_chain
from prefixquant.tasks.train_config import TrainConfig

BLOCKS = 3
CONFIG = TrainConfig(
    epochs=2,
    sequences=32,
    validation_sequences=8,
    sequence_length=12,
    batch_size=4,
    relative_learning_rates=True,
    scale_learning_rate=1e-2,
    weight_learning_rate=2e-2,
    precision="fp32",
)
WINDOWS = tiny.random_ids(40, 12)


class World:
    """A tiny model's rotated and searched blocks, and what has been trained of them."""

    def __init__(self, spec):
        model = tiny.tiny_variant("llama-biases", blocks=BLOCKS)
        self.quantize = QuantizeConfig(weights=spec)
        rotate, family, config = RotateConfig(), tiny.family_of(model), model.config
        self.ends = tiny.build_ends(model, rotate)
        options = {"dtype": torch.float32, "device": tiny.CPU}
        self.weights = [
            rotate_block(tiny.block_weights(model, index), family, head_size(config), index, rotate, **options)
            for index in range(BLOCKS)
        ]
        heads = config.num_key_value_heads
        prefix = torch.randn(2, BLOCKS, heads, 2, head_size(config), generator=torch.Generator().manual_seed(0))
        self.chain = Chain(
            config=config,
            family=family,
            transforms=OnlineTransforms(r3=rotate.r3, r4=rotate.r4),
            quantize=self.quantize,
            dtype=torch.float32,
            prefix=(prefix[0], prefix[1]),
            device=tiny.CPU,
        )
        blocks = tiny.build_blocks(model, rotate, self.quantize)
        stream = self.ends.embedding[WINDOWS]
        ranges = calibrate_blocks(
            blocks, (prefix[0], prefix[1]), stream, CalibrateConfig(), batch_size=8, device=tiny.CPU
        )
        search = SearchConfig(coarse_points=3, fine_points=0, weight_points=6)
        self.start = []
        for index, block in enumerate(blocks):
            own = (prefix[0, index], prefix[1, index])
            with torch.no_grad():
                following = self.chain.full_precision(index, self.weights[index])(stream, own)
            found = quantize_block(block, ranges[index], stream, own, spec, search, batch_size=8)
            self.start.append(block_tensors(self.weights[index], found.weights, found.sites, family, index, spec))
            stream = following
        self.trained, self.published = {}, []

    def rotated(self, block):
        return self.weights[block]

    def searched(self, block):
        return self.start[block]

    def finished(self, block):
        return self.trained.get(block)

    def publish(self, block, tensors, record):
        self.trained[block] = tensors
        self.published.append(block)

    def checkpoints(self, block):
        return None

    def run(self, config=CONFIG, first=0, stop=BLOCKS, **options):
        return train_chain(
            self.chain,
            self,
            first,
            stop,
            self.ends,
            WINDOWS[:32],
            WINDOWS[32:],
            config,
            SingleRank(),
            seed=3,
            **options,
        )


@pytest.fixture
def world():
    return World(WeightSpec(bits=3))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("target", ["fp_input", "quant_input", "both"])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_every_block_is_trained_and_published(world, target, lookahead):
    records = world.run(replace(CONFIG, target=target, lookahead=lookahead))
    assert world.published == [0, 1, 2]
    for record in records:
        assert record["loss_after"] < record["loss_before"]
        assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2]


@pytest.mark.parametrize("spec", [WeightSpec(bits=2, symmetric=False, granularity="group", group_size=16), None])
def test_group_grids_and_no_weight_grid_at_all(spec):
    world = World(spec)
    records = world.run()
    assert all(record["loss_after"] < record["loss_before"] for record in records)
    assert all(not same(world.trained[index], world.start[index]) for index in range(BLOCKS))


def test_the_loss_recorded_is_that_of_what_is_stored(world):
    (record,) = world.run(stop=1)
    block, own = world.chain.quantized(0, world.trained[0]), (world.chain.prefix[0][0], world.chain.prefix[1][0])
    stream = world.ends.embedding[WINDOWS[32:]]
    with torch.no_grad():
        wanted = world.chain.full_precision(0, world.weights[0])(stream, own)
        found = float((block(stream, own) - wanted).square().mean())
    assert found == pytest.approx(record["loss_after"], rel=1e-5)  # a mean in another order


def test_finished_blocks_are_passed_not_trained(world):
    world.run()
    wanted, world.published = dict(world.trained), []
    del world.trained[2]
    (record,) = world.run()
    assert world.published == [2]
    assert record["epochs"][0]["block"] == 2
    assert same(world.trained[2], wanted[2])


def test_a_segment_starts_from_the_full_precision_stream(world):
    world.run(first=1)
    assert world.published == [1, 2]
    inner = world.trained[1]
    other = World(WeightSpec(bits=3))
    other.run()
    assert not same(inner, other.trained[1])  # which saw the quantized stream
    other.trained = {0: other.start[0]}
    other.run(replace(CONFIG, epochs=1), first=1, stop=2)
    assert other.published[-1] == 1  # what lies before a segment has no part in it


@pytest.mark.parametrize("where", ["start", "end"])
def test_gptq_before_and_after_training(world, where):
    plain = World(WeightSpec(bits=3))
    plain.run(stop=1)
    # Weights that start out on their grid must move by half a step before anything changes.
    (record,) = world.run(replace(CONFIG, epochs=8), stop=1, gptq=GptqConfig(training=where))
    assert not same(world.trained[0], plain.trained[0])
    assert ("loss_gptq" in record) == (where == "end")
    assert record.get("loss_gptq", record["loss_after"]) < record["loss_before"]


def test_ranks_take_turns_in_every_batch():
    class Two(SingleRank):
        size = 2

        def __init__(self, rank):
            super().__init__()
            self.rank = rank

    windows = torch.arange(8).unsqueeze(1)
    assert [rank_share(windows, 4, Two(rank)).flatten().tolist() for rank in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    with pytest.raises(ConfigError, match=r"train\.batch_size 3 cannot be shared by 2 ranks"):
        rank_share(windows[:6], 3, Two(0))
