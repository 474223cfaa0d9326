import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, publish_artifact
from prefixquant.tasks.errors import CheckpointError
from prefixquant.tasks.load import LoadedModel, cached_checkpoint, load_model, read_ends

SENTENCE = "Prefix tokens in front;\n 4 bits (and naïveté) behind."


def stored_and_back(model: LoadedModel, folder: Path) -> LoadedModel:
    """The model after a way through a real store."""
    store, key = ArtifactStore(str(folder / "store")), "0" * 64
    publish_artifact(store, key, model.to_artifact(), {})
    return LoadedModel.from_artifact(load_artifact(store, key))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_stored_model_keeps_config_family_and_tokens(tmp_path, variant):
    model = tiny.tiny_variant(variant, blocks=3)
    model.save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    back = stored_and_back(loaded, tmp_path)
    assert back.config.to_dict() == loaded.config.to_dict()
    assert back.family == loaded.family
    assert (back.num_blocks, back.dtype, back.bos_token_id) == (3, "float32", tiny.BOS)
    assert back.files == loaded.files
    original = AutoTokenizer.from_pretrained(tmp_path / "model")
    for special in (True, False):
        wanted = original(SENTENCE, add_special_tokens=special)["input_ids"]
        assert back.tokenizer()(SENTENCE, add_special_tokens=special)["input_ids"] == wanted


def test_stored_model_keeps_its_rope_parameters(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny.write_tiny_model(tmp_path / "model", rope_parameters=rope)
    back = stored_and_back(load_model(str(tmp_path / "model")), tmp_path)
    assert back.config.rope_parameters == rope
    base = model.model
    again = type(base.rotary_emb)(config=back.config)
    assert torch.equal(again.inv_freq, base.rotary_emb.inv_freq)
    plain = type(base.rotary_emb)(config=tiny.tiny_config("llama"))
    assert not torch.equal(plain.inv_freq, again.inv_freq)


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_ends_of_tied_and_untied_models(tmp_path, variant):
    model = tiny.tiny_variant(variant)
    model.save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    ends = read_ends(cached_checkpoint(str(tmp_path)), load_model(str(tmp_path)).family)
    assert torch.equal(ends.embedding, model.get_input_embeddings().weight)
    assert torch.equal(ends.head, model.get_output_embeddings().weight)
    assert torch.equal(ends.gain, model.model.norm.weight)
    assert (ends.head is ends.embedding) == (variant == "llama-tied")


def without_bos(folder: Path) -> None:
    tokenizer = tiny.tiny_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "configured", "found"),
    [("llama", 0, None), ("qwen2", None, tiny.EOS), ("qwen2", 7, 7), ("qwen3", None, tiny.EOS)],
)
def test_bos_of_a_tokenizer_that_has_none(tmp_path, model_type, configured, found):
    tiny.write_tiny_model(tmp_path, model_type, bos_token_id=configured)
    without_bos(tmp_path)
    assert load_model(str(tmp_path)).bos_token_id == found


def test_missing_tokenizer_is_refused_with_the_file_to_add(tmp_path):
    tiny.write_tiny_model(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer cannot be loaded .*; add tokenizer\.json"):
        load_model(str(tmp_path))


def test_checkpoint_is_opened_once_and_again_after_a_change(tmp_path):
    tiny.write_tiny_model(tmp_path)
    first = cached_checkpoint(str(tmp_path))
    assert cached_checkpoint(str(tmp_path)) is first
    tiny.write_tiny_model(tmp_path, blocks=5)
    assert len(cached_checkpoint(str(tmp_path)).tensors) > len(first.tensors)


def test_config_in_the_artifact_is_complete(tmp_path):
    tiny.write_tiny_model(tmp_path)
    config = json.loads(load_model(str(tmp_path)).files["config.json"])
    assert config["rms_norm_eps"] == 1e-3
    assert config["head_dim"] == 16


@pytest.mark.real_model
def test_real_gguf_loads_with_its_bos_and_tokenizer(smollm2, tmp_path):
    loaded = load_model(str(smollm2))
    assert (loaded.bos_token_id, loaded.num_blocks, loaded.dtype) == (1, 30, "float32")
    assert loaded.config.tie_word_embeddings
    back = stored_and_back(loaded, tmp_path)
    original = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    wanted = original(SENTENCE, add_special_tokens=False)["input_ids"]
    assert back.tokenizer()(SENTENCE, add_special_tokens=False)["input_ids"] == wanted
