import pytest
import tiny
import torch

from prefixquant.tasks.calibrate import CalibrateConfig, RangeObserver, calibrate_blocks
from prefixquant.tasks.errors import ConfigError, NumericalError
from prefixquant.tasks.find_prefix import prefix_key_values
from prefixquant.tasks.model.sites import ALL_SITES
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.rotate import RotateConfig

EMA = CalibrateConfig(ema=0.75)


def running_mean(rows: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the mean of the rows by hand: the first as it is, then old * weight + new * (1 - weight)."""
    value = rows[0].double()
    for row in rows[1:]:
        value = weight * value + (1 - weight) * row.double()
    return value.float()


@pytest.mark.parametrize("shape", [(4, 5, 24), (4, 2, 5, 16)], ids=["activation", "keys"])
@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("ema", [0.0, 0.75, 0.99])
def test_observer_averages_the_extremes_of_each_sequence(shape, batch, ema):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    observer = RangeObserver(ema)
    for part in x.split(batch):
        observer(part)
    torch.testing.assert_close(observer.low, running_mean(x.amin(-2), ema))
    torch.testing.assert_close(observer.high, running_mean(x.amax(-2), ema))


def test_observer_of_known_numbers():
    observer = RangeObserver(0.75)
    observer(torch.tensor([[[1.0], [-2.0]], [[5.0], [2.0]], [[-3.0], [-7.0]]]))
    assert observer.low.item() == 0.75 * (0.75 * -2 + 0.25 * 2) + 0.25 * -7
    assert observer.high.item() == 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * -3


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_statistics_are_those_of_the_real_tokens_behind_the_prefix(batch_size):
    model = tiny.tiny_variant("llama", blocks=3)
    prefix_ids, ids = torch.tensor([77, tiny.BOS]), tiny.random_ids(4, 9)
    blocks, embedding = tiny.build_blocks(model, quantize=QuantizeConfig()), tiny.build_ends(model).embedding
    prefix = prefix_key_values(blocks, embedding[prefix_ids], device=tiny.CPU)
    ranges = calibrate_blocks(blocks, prefix, embedding[ids], EMA, batch_size=batch_size, device=tiny.CPU)

    seen: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        sources = {
            "attention_input": layer.self_attn.q_proj,
            "o_input": layer.self_attn.o_proj,
            "mlp_input": layer.mlp.gate_proj,
            "down_input": layer.mlp.down_proj,
        }
        for name, module in sources.items():
            module.register_forward_pre_hook(
                lambda _module, inputs, key=f"{index}/{name}": seen.__setitem__(key, inputs[0][:, 2:])
            )
        layer.self_attn.v_proj.register_forward_hook(
            lambda _module, _inputs, output, key=f"{index}/values": seen.__setitem__(
                key, output[:, 2:].unflatten(-1, (2, 16)).transpose(1, 2)
            )
        )
    cache = model(torch.cat((prefix_ids.expand(4, -1), ids), dim=1), use_cache=True).past_key_values
    seen |= {f"{index}/keys": cache.layers[index].keys[:, :, 2:] for index in range(3)}

    assert all(set(found) == set(ALL_SITES) for found in ranges)
    for key, x in seen.items():
        index, name = key.split("/")
        low, high = ranges[int(index)][name]
        torch.testing.assert_close(low, running_mean(x.amin(-2), 0.75), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(high, running_mean(x.amax(-2), 0.75), rtol=1e-4, atol=1e-5)


def test_calibration_runs_in_full_precision_and_leaves_no_observer():
    model = tiny.tiny_variant("qwen3", blocks=2)
    stream = tiny.build_ends(model, RotateConfig()).embedding[tiny.random_ids(3, 9)]
    ranges = []
    for quantize in (None, QuantizeConfig()):
        blocks = tiny.build_blocks(model, RotateConfig(), quantize)
        ranges.append(calibrate_blocks(blocks, None, stream, EMA, batch_size=2, device=tiny.CPU))
        assert all(site.observer is None and site.enabled for block in blocks for site in block.sites.values())
    for plain, quantized in zip(*ranges, strict=True):
        for name in ALL_SITES:
            assert torch.equal(torch.stack(plain[name]), torch.stack(quantized[name]))


def test_calibration_names_the_block_of_a_nan():
    model = tiny.tiny_variant("llama", blocks=2)
    blocks = tiny.build_blocks(model)
    blocks[1].linear("mlp.down_proj").weight.data[3, 4] = float("inf")
    stream = tiny.build_ends(model).embedding[tiny.random_ids(3, 9)]
    with pytest.raises(NumericalError, match="calibration, block 1: the output holds NaN or infinite"):
        calibrate_blocks(blocks, None, stream, EMA, batch_size=2, device=tiny.CPU)


@pytest.mark.parametrize("ema", [-0.1, 1.0])
def test_calibrate_config_refuses_a_weight_outside_0_to_1(ema):
    with pytest.raises(ConfigError, match=rf"ema must lie in \[0, 1\), got {ema}"):
        CalibrateConfig(ema=ema)
