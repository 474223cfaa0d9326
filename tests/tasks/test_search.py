from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.modules import Site
from prefixquant.tasks.model.quantizer import SiteQuantizer, fake_quantize, weight_groups, weight_scale
from prefixquant.tasks.model.spec import ActivationSpec, KeyValueSpec, QuantizeConfig, WeightSpec
from prefixquant.tasks.rotate import RotateConfig
from prefixquant.tasks.search import (
    SearchConfig,
    block_output,
    input_grams,
    search_site,
    search_weight,
    set_site,
    site_is_searched,
    squared_error,
)

CONFIG = SearchConfig(weight_points=21, weight_min_ratio=0.3)
RATIOS = torch.linspace(1.0, 0.3, 21).tolist()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer() -> tuple[Tensor, Tensor]:
    """A weight with a heavy tail and correlated inputs of unequal size."""
    x = random(64, 24) @ random(24, 24, seed=1) * torch.linspace(0.1, 3, 24)
    return random(6, 24, seed=2) ** 3, x


def rounded(weight: Tensor, spec: WeightSpec, ratio: float) -> Tensor:
    scale, zero_point = weight_scale(weight, spec, ratio)
    return fake_quantize(weight_groups(weight, spec), scale, zero_point, spec.bits, spec.symmetric).reshape(
        weight.shape
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_channel_ratio_is_the_one_of_the_least_output_error(bits, symmetric):
    spec, (weight, x) = WeightSpec(bits=bits, symmetric=symmetric), layer()
    errors = torch.stack([(x @ (weight - rounded(weight, spec, ratio)).T).square().sum(0) for ratio in RATIOS])
    ratio = search_weight(weight, (x.T @ x).unsqueeze(0), spec, CONFIG)
    assert ratio.shape == (6, 1, 1)
    torch.testing.assert_close(ratio.flatten(), torch.tensor(RATIOS)[errors.argmin(0)])
    assert ratio.min() < 1  # the search had something to find


def test_tensor_ratio_is_the_one_of_the_least_output_error():
    spec, (weight, x) = WeightSpec(bits=3, granularity="tensor"), layer()
    errors = torch.stack([(x @ (weight - rounded(weight, spec, ratio)).T).square().sum() for ratio in RATIOS])
    ratio = search_weight(weight, (x.T @ x).unsqueeze(0), spec, CONFIG)
    assert ratio.shape == (1, 1, 1)
    assert ratio.item() == pytest.approx(RATIOS[int(errors.argmin())])
    assert ratio.item() < 1


def test_group_ratio_is_the_one_of_the_least_error_of_its_own_inputs():
    spec, (weight, x) = WeightSpec(bits=3, granularity="group", group_size=8), layer()
    grams = torch.stack([part.T @ part for part in x.split(8, dim=1)])
    ratio = search_weight(weight, grams, spec, CONFIG)
    assert ratio.shape == (6, 3, 1)
    for group, (x_g, w_g) in enumerate(zip(x.split(8, dim=1), weight.split(8, dim=1), strict=True)):
        alone = WeightSpec(bits=3)
        errors = torch.stack([(x_g @ (w_g - rounded(w_g, alone, value)).T).square().sum(0) for value in RATIOS])
        torch.testing.assert_close(ratio[:, group, 0], torch.tensor(RATIOS)[errors.argmin(0)])


def test_weight_on_the_grid_keeps_its_full_range():
    spec, (_, x) = WeightSpec(bits=3, symmetric=False), layer()
    weight = torch.randint(0, 8, (6, 24), generator=torch.Generator().manual_seed(3)).float() - 3
    weight[:, 0], weight[:, 1] = -3, 4
    assert search_weight(weight, (x.T @ x).unsqueeze(0), spec, CONFIG).eq(1).all()


class Parabola:
    """A loss with its minimum at `best` that remembers what was tried."""

    def __init__(self, best: float) -> None:
        self.best = best
        self.tried: list[float] = []

    def __call__(self, ratio: float) -> Tensor:
        self.tried.append(ratio)
        return torch.tensor((ratio - self.best) ** 2, dtype=torch.float64)


def test_fine_grid_finds_a_minimum_off_the_coarse_grid():
    loss, config = Parabola(0.515), SearchConfig()
    ratio, grid = search_site(loss, config)
    assert grid == "fine"
    assert len(loss.tried) == config.coarse_points + config.fine_points
    coarse = loss.tried[:8]
    assert (coarse[0], coarse[-1]) == pytest.approx((0.25, 1.0))
    step = coarse[1] - coarse[0]
    assert abs(ratio - 0.515) < min(abs(value - 0.515) for value in coarse)
    assert abs(ratio - 0.515) <= step / 7 + 1e-9  # six points over two steps lie 2/7 of a step apart


@pytest.mark.parametrize("best", [0.25, 0.25 + 0.75 / 7 * 3, 1.0])
def test_minimum_on_the_coarse_grid_is_kept(best):
    ratio, grid = search_site(Parabola(best), SearchConfig())
    assert grid == "coarse"
    assert ratio == pytest.approx(best)


def test_search_without_fine_points_tries_the_coarse_grid_alone():
    loss = Parabola(0.515)
    assert search_site(loss, SearchConfig(fine_points=0))[1] == "coarse"
    assert len(loss.tried) == 8


def test_fine_grid_stays_above_zero():
    loss = Parabola(0.0)
    ratio, _ = search_site(loss, SearchConfig(min_ratio=0.01, max_ratio=1.0, coarse_points=2))
    assert min(loss.tried) > 0
    assert ratio > 0


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_set_site_covers_a_ratio_of_the_calibrated_range(granularity):
    site = Site(SiteQuantizer(KeyValueSpec(granularity=granularity), 16, 2))
    low, high = -random(2, 16).abs(), random(2, 16, seed=1).abs()
    set_site(site, (low, high), 0.5)
    largest = torch.maximum(low.abs(), high.abs())
    wanted = largest.amax() if granularity == "tensor" else largest.amax(1).reshape(2, 1, 1)
    torch.testing.assert_close(site.quantizer.scale, 0.5 * 2 * wanted / 15)


def test_set_site_sets_the_clipping_ratio_of_a_dynamic_site():
    site = Site(SiteQuantizer(ActivationSpec(mode="dynamic", granularity="token"), 16))
    set_site(site, (torch.zeros(16), torch.ones(16)), 0.7)
    assert site.quantizer.clip_ratio.item() == pytest.approx(0.7)


@pytest.mark.parametrize("group_size", [None, 16])
def test_input_grams_are_those_of_what_each_linear_multiplies(group_size):
    quantize = replace(QuantizeConfig(), activations=ActivationSpec(mode="dynamic", granularity="token"))
    block = tiny.build_blocks(tiny.tiny_variant("qwen3"), RotateConfig(), quantize)[0]
    spec = WeightSpec(granularity="group", group_size=group_size) if group_size else WeightSpec()
    seen: dict[str, Tensor] = {}
    for role in block.family.linears:
        linear = block.linear(role)
        linear.register_forward_hook(
            lambda module, inputs, _out, role=role: seen.__setitem__(role, module.prepare(inputs[0]).flatten(0, 1))
        )
    stream = random(4, 5, 48)
    grams = input_grams(block, lambda: block(stream, None), spec)
    assert set(grams) == set(block.family.linears)
    for role, x in seen.items():
        parts = x.split(group_size or x.shape[1], dim=1)
        wanted = torch.stack([part.T @ part for part in parts])
        torch.testing.assert_close(grams[role], wanted, rtol=1e-4, atol=1e-4)
    pieces = input_grams(block, lambda: block_output(block, stream, None, 1), spec)
    for role, gram in grams.items():
        torch.testing.assert_close(pieces[role], gram, rtol=1e-4, atol=1e-3)
    assert all(not block.linear(role)._forward_pre_hooks for role in block.family.linears)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_squared_error_sums_over_the_whole_stream(batch_size):
    block = tiny.build_blocks(tiny.tiny_variant("llama"))[0]
    stream, target = random(5, 7, 48), random(5, 7, 48, seed=1)
    wanted = (block(stream, None) - target).square().sum().item()
    assert squared_error(block, stream, target, None, batch_size).item() == pytest.approx(wanted, rel=1e-5)


def test_sites_are_searched_as_the_recipe_says():
    config = SearchConfig(keys=False)
    searched = {name: site_is_searched(name, config) for name in ("keys", "values", "o_input", "down_input")}
    assert searched == {"keys": False, "values": True, "o_input": True, "down_input": True}
    assert not site_is_searched("o_input", SearchConfig(activations=False))
    assert not site_is_searched("values", None)


@pytest.mark.parametrize(
    "settings",
    [
        {"coarse_points": 1},
        {"fine_points": -1},
        {"weight_points": 0},
        {"min_ratio": 0.0},
        {"min_ratio": 0.9, "max_ratio": 0.9},
        {"weight_min_ratio": 0.0},
        {"weight_min_ratio": 1.1},
    ],
)
def test_search_config_refuses_an_empty_grid(settings):
    with pytest.raises(ConfigError, match="search"):
        SearchConfig(**settings)
