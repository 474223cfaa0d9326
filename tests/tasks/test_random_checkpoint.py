import pytest
import torch
from transformers import AutoModelForCausalLM

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.load import load_model
from prefixquant.tasks.random_checkpoint import SHAPES, shape_model, write_random_checkpoint

CPU = torch.device("cpu")


def write(folder, **options):
    return write_random_checkpoint(folder, SHAPES["tiny"], blocks=3, device=CPU, **options)


def test_a_random_checkpoint_loads_here_and_in_transformers(tmp_path):
    size = write(tmp_path, vocabulary=300)
    found = load_model(str(tmp_path))
    assert (found.num_blocks, found.dtype, found.bos_token_id) == (3, "bfloat16", 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(parameter.nbytes for parameter in model.parameters()) == size
    assert model.get_output_embeddings().weight.shape == (300, 48)
    ids = found.tokenizer()("a prefix", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_a_shard_holds_one_block(tmp_path):
    write(tmp_path)
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert len(sizes) == 4
    assert sizes[0] == sizes[1] == sizes[2]  # the blocks; the ends are larger


def test_the_same_seed_gives_the_same_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, seed=seed)
    a, b, c = (next((tmp_path / name).glob("model-00001*")).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="258 tokens, got 3 and 100"):
        write(tmp_path, vocabulary=100)


def test_the_70b_shape_is_llama_3s():
    model = shape_model("llama-3-70b")
    assert model.num_blocks == 80
    shape = SHAPES["llama-3-70b"]
    parameters = shape.hidden * (2 * (shape.heads + shape.kv_heads) * 128 + 3 * shape.intermediate)
    assert parameters == 855_638_016
