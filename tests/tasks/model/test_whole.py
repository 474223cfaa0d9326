"""A whole model from its parts: on one device, and spread over several."""

import pytest
import tiny
import torch

from prefixquant.tasks.find_prefix import prefix_key_values
from prefixquant.tasks.load import load_original
from prefixquant.tasks.model.families import FAMILIES
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import QuantizeConfig
from prefixquant.tasks.model.whole import build_model, device_map

PREFIX = torch.tensor([9, 3, tiny.BOS])
IDS = tiny.random_ids(3, 12)


def built(model, devices):
    """Return the model, its blocks as they are, behind the prefix."""
    blocks, ends = tiny.build_blocks(model), tiny.build_ends(model)
    return build_model(
        model.config,
        tiny.family_of(model),
        [(tiny.block_weights(model, index), {}) for index in range(len(blocks))],
        ends,
        prefix_key_values(blocks, ends.embedding[PREFIX], device=tiny.CPU),
        quantize=QuantizeConfig(weights=None, activations=None, keys=None, values=None),
        transforms=OnlineTransforms(r3=False, r4=False),
        devices=devices,
    )


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("devices", [1, 2], ids=["one-device", "two-devices"])
def test_a_built_model_is_the_original_behind_its_prefix(variant, devices):
    """Two devices are the CPU twice: accelerate's hooks stand between the blocks as they do between GPUs."""
    model = tiny.tiny_variant(variant)
    wanted = model(torch.cat([PREFIX.expand(3, -1), IDS], dim=1)).logits[:, 3:]
    assert tiny.relative_error(built(model, [tiny.CPU] * devices)(IDS).logits, wanted) < 1e-5


def test_blocks_are_spread_in_equal_consecutive_parts():
    placed = device_map(FAMILIES["llama"], 5, [torch.device("cuda", index) for index in range(2)])
    assert [placed[f"model.layers.{block}"].index for block in range(5)] == [0, 0, 0, 1, 1]
    assert placed["model.embed_tokens"].index == placed["model.rotary_emb"].index == 0
    assert placed["model.norm"].index == placed["lm_head"].index == 1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_original_loads_on_several_devices_as_on_one(tmp_path, tied):
    tiny.write_tiny_model(tmp_path, tie_word_embeddings=tied)
    one, two = (load_original(str(tmp_path), "auto", [tiny.CPU] * count) for count in (1, 2))
    torch.testing.assert_close(two(IDS).logits, one(IDS).logits, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_compute_what_one_does(tmp_path):
    gpus = [torch.device("cuda", index) for index in range(2)]
    model = tiny.write_tiny_model(tmp_path, blocks=4)
    ids = IDS.to(gpus[0])
    one, two = (built(model, devices)(ids).logits.to(gpus[0]) for devices in (gpus[:1], gpus))
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    spread = load_original(str(tmp_path), "auto", gpus)
    assert {parameter.device for parameter in spread.parameters()} == set(gpus)
    alone = load_original(str(tmp_path), "auto", gpus[:1])
    torch.testing.assert_close(spread(ids).logits.to(gpus[0]), alone(ids).logits, rtol=0, atol=0)
