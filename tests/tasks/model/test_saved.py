from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.quantizer import QuantizedWeight, round_to_nearest
from prefixquant.tasks.model.saved import block_tensors, block_weights, unpack_weight
from prefixquant.tasks.model.spec import WeightSpec

BLOCK = 1
CONFIG = tiny.tiny_config("llama", attention_bias=True)
MODEL = tiny.tiny_model(CONFIG)
FAMILY = tiny.family_of(MODEL)
WEIGHTS = tiny.block_weights(MODEL, BLOCK)
SHAPES = block_shapes(CONFIG, BLOCK)
PREFIX = FAMILY.block_prefix(BLOCK)
GROUPS = {"tensor": None, "channel": None, "group": 16}


def quantized(spec: WeightSpec) -> dict[str, QuantizedWeight]:
    return {role: round_to_nearest(WEIGHTS[f"{role}.weight"], spec, 0.7) for role in FAMILY.linears}


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_weights_round_trip_exactly(tmp_path: Path, bits, symmetric, granularity):
    spec = WeightSpec(bits=bits, symmetric=symmetric, granularity=granularity, group_size=GROUPS[granularity])
    before = quantized(spec)
    codes = torch.cat([weight.codes.flatten() for weight in before.values()])
    assert codes.max() - codes.min() == 2**bits - 1  # both ends of the range occur: clipping at 0.7 makes sure
    save_file(block_tensors(WEIGHTS, before, {}, FAMILY, BLOCK, spec), tmp_path / "block.safetensors")
    stored = load_file(tmp_path / "block.safetensors")
    for role, weight in before.items():
        found = unpack_weight(stored, PREFIX + role, weight.codes.shape, spec)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
        assert torch.equal(found.zero_point, weight.zero_point)
    weights, sites = block_weights(stored, SHAPES, FAMILY, BLOCK, spec, torch.float32)
    assert sites == {}
    assert weights.keys() == WEIGHTS.keys()
    for name, tensor in weights.items():
        role = name.removesuffix(".weight")
        wanted = before[role].dequantize(spec) if role in before else WEIGHTS[name]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_on_disk_are_as_wide_as_their_bits(tmp_path: Path, bits):
    spec = WeightSpec(bits=bits)
    tensors = block_tensors(WEIGHTS, quantized(spec), {}, FAMILY, BLOCK, spec)
    packed = {name: tensor for name, tensor in tensors.items() if name.endswith("weight_packed")}
    assert len(packed) == 7
    save_file(packed, tmp_path / "codes.safetensors")
    header = 8 + int.from_bytes((tmp_path / "codes.safetensors").read_bytes()[:8], "little")
    wanted = 0
    for role in FAMILY.linears:
        rows, columns = WEIGHTS[f"{role}.weight"].shape
        wanted += rows * (-(-columns * bits // 32) * 4)  # a row ends on a word
    assert (tmp_path / "codes.safetensors").stat().st_size - header == wanted


def test_weights_that_are_off_and_sites_are_stored_as_they_are():
    sites = {
        "keys": {"scale": torch.rand(2, 1, 1), "zero_point": torch.zeros(2, 1, 1)},
        "down_input": {"clip_ratio": torch.tensor(0.9)},
    }
    tensors = block_tensors(WEIGHTS, {}, sites, FAMILY, BLOCK, None)
    assert f"{PREFIX}sites.down_input.clip_ratio" in tensors
    weights, found = block_weights(tensors, SHAPES, FAMILY, BLOCK, None, torch.float32)
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)
    assert found.keys() == sites.keys()
    for site, parameters in sites.items():
        assert found[site].keys() == parameters.keys()
        assert all(torch.equal(found[site][name], parameters[name]) for name in parameters)
