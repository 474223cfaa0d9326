import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from exported import Exported
from transformers import DynamicCache

from prefixquant.tasks.errors import CheckpointError
from prefixquant.tasks.export import DESCRIPTION, PREFIX_FILE, block_file, is_exported, load_quantized
from prefixquant.tasks.model.cache import prefix_cache_for

PREFIX_IDS = [5, 7, tiny.BOS]
STATIC = {"prefix": {"tokens": PREFIX_IDS}}
DYNAMIC = {
    "prefix": {"tokens": PREFIX_IDS},
    "rotate": {"r3": False},
    "quantize": {
        "weights": {"bits": 3, "symmetric": False, "granularity": "group", "group_size": 16},
        "activations": {"mode": "dynamic", "granularity": "token"},
        "keys": {"mode": "dynamic", "before_rope": True},
        "values": {"mode": "dynamic", "granularity": "group", "group_size": 8, "symmetric": False},
    },
}
PLAIN = {"prefix": {"tokens": []}, "quantize": dict.fromkeys(("weights", "activations", "keys", "values"), "off")}
CASES = {
    "llama-static": ("llama-biases", STATIC),
    "llama-tied-half": ("llama-tied", STATIC | {"model.dtype": "bfloat16"}),
    "mistral-window": ("mistral-window", STATIC),
    "qwen2-dynamic": ("qwen2-tied", DYNAMIC),
    "qwen3-dynamic": ("qwen3", DYNAMIC),
    "llama-off": ("llama", PLAIN),
}


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Exported:
    return Exported(tmp_path_factory.mktemp("static"), *CASES["llama-static"])


@pytest.fixture(scope="module")
def loaded(static) -> Any:
    return load_quantized(static.folder)


@pytest.fixture
def copy(static, tmp_path) -> Path:
    """A folder to spoil."""
    return Path(shutil.copytree(static.folder, tmp_path / "copy"))


@pytest.mark.parametrize("case", CASES)
def test_reloaded_model_gives_the_logits_of_the_block_chain(tmp_path, case):
    exported = Exported(tmp_path, *CASES[case])
    ids = tiny.random_ids(2, 24)
    wanted = exported.simulated_logits(ids)
    found = load_quantized(exported.folder)(input_ids=ids).logits
    assert found.dtype == wanted.dtype
    assert tiny.relative_error(found.float(), wanted.float()) < (1e-5 if wanted.dtype == torch.float32 else 2e-2)


def test_in_float64_weights_are_codes_times_scales_without_rounding(static, loaded):
    exact = load_quantized(static.folder, dtype=torch.float64)
    rounded = False
    for (name, wanted), found in zip(loaded.named_parameters(), exact.parameters(), strict=True):
        assert found.dtype == torch.float64
        assert torch.equal(found.float(), wanted), name
        rounded |= not torch.equal(found, wanted.double())
    assert rounded
    assert exact(input_ids=tiny.random_ids(2, 8)).logits.dtype == torch.float64


def test_weights_off_and_no_prefix_reload_as_the_original_model(tmp_path):
    exported = Exported(tmp_path, *CASES["llama-off"])
    assert not (exported.folder / PREFIX_FILE).exists()
    ids = tiny.random_ids(2, 24)
    wanted = tiny.tiny_variant("llama")(input_ids=ids).logits
    assert tiny.relative_error(load_quantized(exported.folder)(input_ids=ids).logits, wanted) < 1e-5


def test_quantization_is_really_on_and_the_prefix_really_in_front(static, loaded):
    ids = tiny.random_ids(1, 24)
    found = loaded(input_ids=ids).logits
    assert found.shape == (1, 24, tiny.VOCABULARY)
    original = tiny.tiny_variant("llama-biases")
    behind = original(input_ids=torch.cat([torch.tensor([PREFIX_IDS]), ids], dim=1)).logits[:, len(PREFIX_IDS) :]
    alone = original(input_ids=ids).logits
    assert 1e-3 < tiny.relative_error(found, behind) < tiny.relative_error(found, alone)


def test_each_row_of_a_batch_is_as_alone(loaded):
    ids = tiny.random_ids(3, 20)
    together = loaded(input_ids=ids).logits
    for row in range(3):
        assert tiny.relative_error(together[row], loaded(input_ids=ids[row : row + 1]).logits[0]) < 1e-5


def test_padding_on_the_right_changes_nothing_before_it(loaded):
    ids, lengths = tiny.random_ids(2, 20), (20, 13)
    mask = torch.tensor([[1] * length + [0] * (20 - length) for length in lengths])
    padded = loaded(input_ids=ids * mask, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = loaded(input_ids=ids[row : row + 1, :length]).logits
        assert tiny.relative_error(padded[row, :length], alone[0]) < 1e-5


@pytest.mark.parametrize("positions", ["none", "of the mask"])
def test_padding_on_the_left_changes_nothing_behind_it(loaded, positions):
    ids, mask = tiny.random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    given = {} if positions == "none" else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    padded = loaded(input_ids=ids * mask, attention_mask=mask, **given).logits
    for row, start in enumerate((0, 7)):
        alone = loaded(input_ids=ids[row : row + 1, start:]).logits
        assert tiny.relative_error(padded[row, start:], alone[0]) < 1e-5


def test_given_positions_count_from_the_first_token_behind_the_prefix(loaded):
    ids = tiny.random_ids(2, 20)
    wanted = loaded(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids, position_ids=torch.arange(20)[None]).logits, wanted)


OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def greedy(model, prompt, tokens):
    """Return a prompt and what a full forward for each token goes on with."""
    for _ in range(tokens):
        prompt = torch.cat([prompt, model(input_ids=prompt).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("limit", [{"max_new_tokens": 6}, {"max_length": 12}], ids=str)
def test_greedy_generation_equals_a_full_forward_for_each_token(loaded, limit):
    prompt = tiny.random_ids(2, 6)
    wanted = greedy(loaded, prompt, 6).tolist()
    assert loaded.generate(prompt, **limit, **OPTIONS).tolist() == wanted
    found = loaded.generate(input_ids=prompt, return_dict_in_generate=True, **limit, **OPTIONS)
    assert found.sequences.tolist() == wanted


def test_prompts_padded_on_the_left_generate_what_they_do_alone(loaded):
    prompt, mask = tiny.random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    found = loaded.generate(prompt * mask, attention_mask=mask, max_new_tokens=4, **OPTIONS)
    assert found[0].tolist() == greedy(loaded, prompt[:1], 4)[0].tolist()
    assert found[1, 3:].tolist() == greedy(loaded, prompt[1:, 3:], 4)[0].tolist()


@pytest.mark.parametrize("copies", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_several_sequences_of_a_prompt_start_behind_the_prefix_each(loaded, copies):
    prompt = tiny.random_ids(2, 6)
    torch.manual_seed(0)
    found = loaded.generate(prompt, max_new_tokens=4, **(OPTIONS | copies))
    repeats = copies.get("num_return_sequences", 1)
    assert found.shape == (2 * repeats, 10)
    assert torch.equal(found[:, :6], prompt.repeat_interleave(repeats, 0))


def test_a_cache_of_the_callers_own_goes_with_the_ids_of_the_prefix(loaded):
    prompt = tiny.random_ids(2, 6)
    start = torch.cat([torch.tensor([PREFIX_IDS] * 2), prompt], dim=1)
    found = loaded.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        past_key_values=prefix_cache_for(loaded, 2),
        max_new_tokens=6,
        **OPTIONS,
    )
    assert found[:, len(PREFIX_IDS) :].tolist() == greedy(loaded, prompt, 6).tolist()


def test_generation_from_embeddings_is_refused(loaded):
    with pytest.raises(ValueError, match="takes input_ids"):
        loaded.generate(inputs_embeds=torch.zeros(1, 3, loaded.config.hidden_size), max_new_tokens=1)


def test_foreign_cache_is_refused_with_the_right_one(loaded):
    with pytest.raises(ValueError, match=r"prefix_cache_for\(model, batch_size\)"):
        loaded(input_ids=tiny.random_ids(1, 4), past_key_values=DynamicCache())


def test_reloading_twice_gives_the_same_model(static, loaded):
    ids = tiny.random_ids(1, 8)
    assert torch.equal(load_quantized(static.folder)(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_folder_is_complete_by_its_own_index(static):
    assert is_exported(static.folder)
    index = json.loads((static.folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {path.name for path in static.folder.glob("model-*.safetensors")}
    assert set(index.values()) == shards
    assert {"config.json", "tokenizer.json", DESCRIPTION, PREFIX_FILE} <= {p.name for p in static.folder.iterdir()}


@pytest.mark.parametrize("name", [block_file(1), "model-ends.safetensors", PREFIX_FILE, DESCRIPTION, "config.json"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_quantized(copy)


def test_truncated_shard_is_named(copy):
    data = (copy / block_file(0)).read_bytes()
    (copy / block_file(0)).write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match=rf"{block_file(0)} is truncated"):
        load_quantized(copy)


def test_shard_of_another_block_is_refused(copy):
    shutil.copy(copy / block_file(0), copy / block_file(1))
    with pytest.raises(CheckpointError, match=block_file(1)):
        load_quantized(copy)


def test_other_format_version_is_refused_with_both_versions(copy):
    description = json.loads((copy / DESCRIPTION).read_text())
    (copy / DESCRIPTION).write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1; run the recipe again"):
        load_quantized(copy)


def test_damaged_description_is_refused(copy):
    (copy / DESCRIPTION).write_text("{")
    with pytest.raises(CheckpointError, match="run the recipe again"):
        load_quantized(copy)
