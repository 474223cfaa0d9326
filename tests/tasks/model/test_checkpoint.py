import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from prefixquant.tasks.errors import CheckpointError, NumericalError, UnsupportedModelError
from prefixquant.tasks.model.block import block_shapes
from prefixquant.tasks.model.checkpoint import INDEX_FILE, SINGLE_FILE, check_checkpoint, check_finite, open_checkpoint
from prefixquant.tasks.model.families import LLAMA


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one safetensors file."""
    tiny.write_tiny_model(tmp_path / "single", blocks=2)
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in several shards."""
    tiny.write_tiny_model(tmp_path / "sharded", blocks=2, sharded=True)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_checkpoint_reads_what_the_model_holds(layout, request):
    checkpoint = open_checkpoint(request.getfixturevalue(layout))
    config, family = check_checkpoint(checkpoint)
    state = tiny.tiny_model(tiny.tiny_config("llama", blocks=2)).state_dict()
    assert family is LLAMA
    assert config.num_hidden_layers == 2
    assert set(checkpoint.tensors) == set(state)
    assert checkpoint.default_dtype == torch.float32
    for name, wanted in state.items():
        assert checkpoint.tensors[name].shape == tuple(wanted.shape)
        assert torch.equal(checkpoint.read(name), wanted)


def test_read_block_gives_block_relative_names(sharded):
    wanted = tiny.block_weights(tiny.tiny_model(tiny.tiny_config("llama", blocks=2)), 1)
    block = open_checkpoint(sharded).read_block(LLAMA, 1, wanted)
    assert set(block) == set(wanted)
    assert all(torch.equal(block[name], wanted[name]) for name in wanted)


def test_read_block_does_not_mix_blocks_1_and_10(tmp_path):
    model = tiny.write_tiny_model(tmp_path, blocks=12)
    wanted = tiny.block_weights(model, 1)
    block = open_checkpoint(tmp_path).read_block(LLAMA, 1, wanted)
    assert all(torch.equal(block[name], wanted[name]) for name in wanted)


def test_checkpoint_with_rotary_frequencies_of_old_keeps_its_type_and_its_blocks(tmp_path):
    model = tiny.tiny_model(tiny.tiny_config("llama", blocks=2)).half()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    frequencies = {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": torch.ones(8) for block in range(2)}
    save_file(state | frequencies, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    config, family = check_checkpoint(checkpoint)
    assert checkpoint.default_dtype == torch.float16
    assert set(checkpoint.read_block(family, 1, block_shapes(config, 1))) == set(tiny.block_weights(model, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoint_keeps_the_stored_type(tmp_path, dtype):
    tiny.tiny_model(tiny.tiny_config("llama")).to(dtype).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.default_dtype == dtype
    assert checkpoint.read("model.norm.weight").dtype == dtype


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_check_checkpoint_accepts_every_variant(variant, tmp_path):
    model = tiny.tiny_variant(variant)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    _, family = check_checkpoint(checkpoint)
    assert family is tiny.family_of(model)
    assert checkpoint.has_head(family) == (not model.config.tie_word_embeddings)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_named_when_opened(single, keep):
    truncate(single / SINGLE_FILE, keep)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated.*download it again"):
        open_checkpoint(single)


def test_truncated_shard_is_named_when_opened(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    truncate(shard, size - 4)
    with pytest.raises(
        CheckpointError, match=f"{shard.name} is truncated: its header needs {size} bytes, it has {size - 4}"
    ):
        open_checkpoint(sharded)


def test_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing; download the shard again"):
        open_checkpoint(sharded)


def test_shard_without_a_tensor_of_the_index_is_named(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    tensors = load_file(sharded / shard)
    del tensors[name]
    save_file(tensors, sharded / shard)
    with pytest.raises(CheckpointError, match=rf"{shard}: .* promises {name} \(1 tensors missing\)"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_damaged_index_is_named(sharded, text):
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        open_checkpoint(sharded)


def test_missing_tensor_is_named_with_its_shape(single):
    tensors = load_file(single / SINGLE_FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, single / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \[96, 48\] is missing"):
        check_checkpoint(open_checkpoint(single))


def test_missing_head_of_untied_embeddings_is_named(single):
    tensors = load_file(single / SINGLE_FILE)
    del tensors["lm_head.weight"]
    save_file(tensors, single / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing and the embeddings are not tied"):
        check_checkpoint(open_checkpoint(single))


def test_shape_that_contradicts_the_config_is_named(single):
    tiny.edit_config(single, intermediate_size=128)
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight has shape \[96, 48\], its config implies \[128, 48\]"
    ):
        check_checkpoint(open_checkpoint(single))


def test_folder_without_config_is_refused(single):
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(single)


def test_folder_without_weights_is_refused(single):
    (single / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"only safetensors weights are read"):
        open_checkpoint(single)


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give a model folder"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "no_such_type", None])
def test_unknown_model_type_is_refused_with_the_known_ones(single, model_type):
    tiny.edit_config(single, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match="is not supported; known are llama, mistral, qwen2, qwen3"):
        check_checkpoint(open_checkpoint(single))


def test_damaged_config_is_named(single):
    truncate(single / "config.json", 40)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_checkpoint(open_checkpoint(single))


def test_other_head_on_a_known_decoder_is_refused(single):
    tiny.edit_config(single, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UnsupportedModelError, match=r"LlamaForSequenceClassification.*is not LlamaForCausalLM"):
        check_checkpoint(open_checkpoint(single))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_check_finite_names_the_tensor_and_counts(bad):
    tensors = {"fine": torch.ones(3), "bad": torch.tensor([1.0, bad, bad, 2.0])}
    with pytest.raises(NumericalError, match="block 7: bad holds 2 NaN or infinite values of 4"):
        check_finite(tensors.items(), "block 7")
