from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from prefixquant.tasks.calibrate import CalibrateConfig, Ranges, calibrate_blocks
from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.find_prefix import prefix_key_values
from prefixquant.tasks.model.block import Block, Prefix, block_prefix
from prefixquant.tasks.model.quantizer import code_range, round_to_nearest, weight_groups
from prefixquant.tasks.model.sites import ALL_SITES
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.quantize_block import BlockResult, quantize_block
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.search import SearchConfig

STATIC = QuantizeConfig()
DYNAMIC = QuantizeConfig(
    activations=ActivationSpec(mode="dynamic", granularity="token"),
    keys=KeyValueSpec(mode="dynamic", symmetric=False),
    values=KeyValueSpec(mode="dynamic", granularity="group", group_size=8),
)
EIGHT_BITS = QuantizeConfig(
    weights=WeightSpec(bits=8),
    activations=ActivationSpec(bits=8),
    keys=KeyValueSpec(bits=8),
    values=KeyValueSpec(bits=8),
)
SEARCH = SearchConfig(coarse_points=5, fine_points=3, weight_points=10)


class Prepared:
    """A rotated block with its ranges, stream and prefix."""

    def __init__(self, quantize: QuantizeConfig, variant: str = "llama") -> None:
        model = tiny.tiny_variant(variant)
        blocks, embedding = (
            tiny.build_blocks(model, RotateConfig(), quantize),
            tiny.build_ends(model, RotateConfig()).embedding,
        )
        stacked = prefix_key_values(blocks, embedding[[77, tiny.BOS]], device=tiny.CPU)
        stream = embedding[tiny.random_ids(6, 17)]
        ranges = calibrate_blocks(blocks, stacked, stream, CalibrateConfig(ema=0.5), batch_size=3, device=tiny.CPU)
        self.spec = quantize.weights
        self.block: Block = blocks[1]
        self.ranges: Ranges = ranges[1]
        self.prefix: Prefix | None = block_prefix(stacked, 1, tiny.CPU)
        self.stream: Tensor = blocks[0](stream, block_prefix(stacked, 0, tiny.CPU))

    def quantize(self, config: SearchConfig | None = SEARCH) -> BlockResult:
        return quantize_block(self.block, self.ranges, self.stream, self.prefix, self.spec, config, batch_size=4)


@pytest.mark.parametrize("quantize", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3"])
def test_search_lowers_the_block_error(variant, quantize):
    result = Prepared(quantize, variant).quantize()
    assert 0 < result.error < result.error_before < 1
    assert set(result.search) == set(ALL_SITES)
    assert {entry["grid"] for entry in result.search.values()} <= {"coarse", "fine"}


def test_reported_errors_are_those_of_the_block_before_and_after():
    prepared = Prepared(STATIC)
    block, stream, prefix = prepared.block, prepared.stream, prepared.prefix
    with block.only():
        target = block(stream, prefix)
    before = Prepared(STATIC).quantize(None)
    result = prepared.quantize()
    error = ((block(stream, prefix) - target).square().sum() / target.square().sum()).item()
    assert result.error == pytest.approx(error, rel=1e-4)
    assert result.error_before == pytest.approx(before.error, rel=1e-4)


def test_eight_bits_cost_less_than_a_thousandth():
    assert Prepared(EIGHT_BITS).quantize().error < 1e-3


def test_more_bits_cost_less():
    errors = []
    for bits in (3, 4, 6, 8):
        quantize = QuantizeConfig(
            **{
                name: replace(getattr(EIGHT_BITS, name), bits=bits)
                for name in ("weights", "activations", "keys", "values")
            }
        )
        errors.append(Prepared(quantize).quantize().error)
    assert errors == sorted(errors, reverse=True)


def test_result_holds_what_the_block_was_left_with():
    prepared = Prepared(STATIC)
    result = prepared.quantize()
    assert set(result.weights) == set(prepared.block.family.linears)
    for role, weight in result.weights.items():
        assert torch.equal(prepared.block.linear(role).weight, weight.dequantize(prepared.spec))
    assert set(result.sites) == set(ALL_SITES)
    for name, parameters in result.sites.items():
        assert set(parameters) == {"scale", "zero_point"}
        assert torch.equal(parameters["scale"], prepared.block.sites[name].quantizer.scale)


def test_dynamic_sites_keep_their_clipping_ratio():
    result = Prepared(DYNAMIC).quantize()
    for name, parameters in result.sites.items():
        assert set(parameters) == {"clip_ratio"}
        assert parameters["clip_ratio"].unique().tolist() == pytest.approx([result.search[name]["ratio"]])


def test_weights_that_are_off_stay_as_they_are():
    prepared = Prepared(replace(STATIC, weights=None))
    before = {role: prepared.block.linear(role).weight.clone() for role in prepared.block.family.linears}
    result = prepared.quantize()
    assert result.weights == {}
    assert all(torch.equal(prepared.block.linear(role).weight, weight) for role, weight in before.items())


def test_groups_that_are_off_have_no_sites():
    result = Prepared(replace(STATIC, activations=None, keys=None)).quantize()
    assert set(result.sites) == set(result.search) == {"values"}


def test_without_search_the_full_ranges_are_kept():
    prepared = Prepared(STATIC)
    result = prepared.quantize(None)
    assert result.search == {}
    assert result.error == result.error_before
    low, high = prepared.ranges["down_input"]
    wanted = 2 * max(low.abs().max(), high.abs().max()) / 15
    torch.testing.assert_close(result.sites["down_input"]["scale"], wanted)


def test_only_what_the_recipe_names_is_searched():
    config = replace(SEARCH, weights=False, activations=False, values=False)
    prepared = Prepared(STATIC)
    originals = {role: prepared.block.linear(role).weight.clone() for role in prepared.block.family.linears}
    result = prepared.quantize(config)
    assert set(result.search) == {"keys"}
    for role, weight in originals.items():
        assert torch.equal(result.weights[role].codes, round_to_nearest(weight, prepared.spec, 1.0).codes)


def test_same_inputs_give_the_same_codes():
    first, second = Prepared(STATIC).quantize(), Prepared(STATIC).quantize()
    assert first.error == second.error
    for role, weight in first.weights.items():
        assert torch.equal(weight.codes, second.weights[role].codes)


def test_keys_before_rope_are_quantized_and_their_projection_too():
    prepared = Prepared(replace(STATIC, keys=KeyValueSpec(before_rope=True)))
    result = prepared.quantize()
    assert "self_attn.k_proj" in result.weights
    assert "keys" in result.sites
    assert result.error < result.error_before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_input_names_the_block(bad):
    prepared = Prepared(STATIC)
    prepared.stream[2, 3, 5] = bad
    with pytest.raises(NumericalError, match="block 1: its full-precision output holds NaN"):
        prepared.quantize()


def test_bad_ranges_name_the_block():
    prepared = Prepared(STATIC)
    prepared.ranges["o_input"][1][5] = float("nan")
    with pytest.raises(NumericalError, match="block 1: its quantized output holds NaN"):
        prepared.quantize()


def test_quantizers_outside_the_named_sites_are_enabled_again():
    prepared = Prepared(STATIC)
    prepared.quantize()
    assert all(site.enabled for site in prepared.block.sites.values())


def test_each_site_is_searched_behind_those_before_it():
    prepared = Prepared(STATIC)
    states: list[tuple[str, ...]] = []

    def note_enabled(_x: Tensor) -> None:
        now = tuple(name for name, site in prepared.block.sites.items() if site.enabled)
        if not states or states[-1] != now:
            states.append(now)

    prepared.block.sites["attention_input"].observer = note_enabled
    prepared.quantize()
    # the target, the error before the search, the inputs of the linears; then site after site
    assert states == [(), ALL_SITES, (), *(ALL_SITES[: count + 1] for count in range(6))]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grouping", [{"granularity": "tensor"}, {}, {"granularity": "group", "group_size": 8}])
def test_round_to_nearest_is_within_half_a_scale(bits, symmetric, grouping):
    spec = WeightSpec(bits=bits, symmetric=symmetric, **grouping)
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) + 0.3
    rounded = round_to_nearest(weight, spec, 1.0)
    low, high = code_range(bits, symmetric)
    assert rounded.codes.dtype == torch.int16
    assert rounded.codes.shape == weight.shape
    assert low <= rounded.codes.min()
    assert rounded.codes.max() <= high
    error = weight_groups(rounded.dequantize(spec) - weight, spec).abs() / rounded.scale
    assert error.max() <= 0.5 + 1e-4  # float32 roundings
