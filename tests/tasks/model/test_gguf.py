from pathlib import Path

import pytest
import tiny
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel

from prefixquant.tasks.errors import CheckpointError, UnsupportedModelError
from prefixquant.tasks.model.checkpoint import check_checkpoint, open_checkpoint
from prefixquant.tasks.model.gguf import GGUFCheckpoint

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PAIRED = ("self_attn.q_proj", "self_attn.k_proj")


def gguf_model(model_type: str) -> PreTrainedModel:
    """A model of hidden size 64: GGUF derives the head's size from it."""
    return tiny.tiny_model(tiny.tiny_config(model_type, hidden_size=64, tie_word_embeddings=False))


def write_gguf(path: Path, model: PreTrainedModel, extra: str | None = None) -> None:
    """Write a model as llama.cpp would, in float32: for Llama the halves of each head's rotary pairs interleaved."""
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(16)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, block, part = stem.split(".", 3)
            if config.model_type == "llama" and part in PAIRED:
                heads = tensor.shape[0] // 16
                tensor = tensor.reshape(heads, 2, 8, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
            written = f"blk.{block}.{PARTS[part]}.{suffix}"
        else:
            written = f"{TOP[stem]}.{suffix}"
        writer.add_tensor(written, tensor.contiguous().numpy())
    if extra is not None:
        writer.add_tensor(extra, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_the_tensors_under_their_hugging_face_names(model_type, tmp_path):
    model = gguf_model(model_type)
    write_gguf(tmp_path / "tiny.gguf", model)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    state = model.state_dict()
    assert set(checkpoint.tensors) == set(state)
    for name, wanted in state.items():
        assert checkpoint.tensors[name].shape == tuple(wanted.shape)
        assert torch.equal(checkpoint.read(name), wanted), name


def test_gguf_with_scaled_rotary_frequencies_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", gguf_model("llama"), extra="rope_freqs.weight")
    with pytest.raises(UnsupportedModelError, match=r"scales its rotary frequencies.*Hugging Face folder"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_gguf_agrees_with_its_config(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", gguf_model("llama"))
    config, family = check_checkpoint(open_checkpoint(tmp_path / "tiny.gguf"))
    assert family.model_type == "llama"
    assert (config.hidden_size, config.num_key_value_heads, config.num_hidden_layers) == (64, 2, 2)
    assert config.rms_norm_eps == pytest.approx(1e-3)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, -100])
def test_truncated_gguf_is_refused(tmp_path, keep):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_model("llama"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is truncated or no GGUF file.*download it again"):
        open_checkpoint(path)


def test_gguf_of_an_unknown_architecture_is_refused(tmp_path):
    model = gguf_model("llama")
    model.config.model_type = "phi3"
    write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(UnsupportedModelError, match="'phi3' is not supported; known are llama"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_gguf_tensor_without_a_place_is_named(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", gguf_model("llama"), extra="blk.0.ffn_gate_inp.weight")
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_gate_inp\.weight has no place in a llama block"):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.real_model
def test_real_gguf_dequantizes_as_transformers_does(smollm2, smollm2_model):
    checkpoint = open_checkpoint(smollm2)
    assert isinstance(checkpoint, GGUFCheckpoint)
    config, family = check_checkpoint(checkpoint)
    assert (config.num_hidden_layers, config.hidden_size, config.tie_word_embeddings) == (30, 576, True)
    state = smollm2_model.state_dict()
    assert not checkpoint.has_head(family)
    assert set(checkpoint.tensors) == set(state) - {"lm_head.weight"}
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), state[name]), name


@pytest.mark.real_model
def test_truncated_real_gguf_is_refused(smollm2, tmp_path):
    with smollm2.open("rb") as file:
        (tmp_path / "part.gguf").write_bytes(file.read(smollm2.stat().st_size // 2))
    with pytest.raises(CheckpointError, match=r"part\.gguf is truncated"):
        open_checkpoint(tmp_path / "part.gguf")
