import json
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.profiles.prefix import adapter_files, put_prefix_first

IDS = [40, 41, tiny.BOS]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PROCESSORS = {
    "bos": None,  # the tiny tokenizer's own: BOS first
    "bytes": processors.ByteLevel(trim_offsets=True),
    "sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tiny.BOS)]),
        ]
    ),
}


def write(folder: Path, processor=None, chat: str | None = CHAT) -> Path:
    tokenizer = tiny.tiny_tokenizer()
    if processor is not None:
        tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("processor", PROCESSORS)
def test_prefix_comes_first_in_texts_pairs_and_chats_and_bos_gives_way(processor, tmp_path):
    plain = AutoTokenizer.from_pretrained(write(tmp_path / "plain", PROCESSORS[processor]))
    assert put_prefix_first(write(tmp_path / "first", PROCESSORS[processor]), IDS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    one, two = (plain(text, add_special_tokens=False).input_ids for text in ("one", "two"))
    assert tokenizer("one").input_ids == IDS + one
    assert tokenizer("one", "two").input_ids == IDS + one + two
    assert tokenizer("one", add_special_tokens=False).input_ids == one
    chat = [{"role": "user", "content": "one"}]
    rendered = plain.apply_chat_template(chat, tokenize=False)
    wanted = IDS + plain(rendered, add_special_tokens=False).input_ids
    assert tokenizer.apply_chat_template(chat, return_dict=False) == wanted


def test_prefix_survives_another_save(tmp_path):
    put_prefix_first(write(tmp_path / "first"), IDS)
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert AutoTokenizer.from_pretrained(tmp_path / "second")("a").input_ids[:3] == IDS


def test_chat_template_stays_where_its_text_would_be_other_tokens(tmp_path):
    folder = write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = next(
        [token, tiny.BOS]
        for token in range(2, tiny.VOCABULARY)
        if tokenizer(tokenizer.decode([token]), add_special_tokens=False).input_ids != [token]
    )
    before = (folder / "chat_template.jinja").read_text()
    assert not put_prefix_first(folder, ids)
    assert (folder / "chat_template.jinja").read_text() == before
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[:2] == ids


def test_tokenizer_without_chats_carries_the_prefix_in_texts_alone(tmp_path):
    assert not put_prefix_first(write(tmp_path, chat=None), IDS)
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids[:3] == IDS


def test_tokenizer_without_its_file_is_refused(tmp_path):
    (write(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json, in which a prefix can be written"):
        put_prefix_first(tmp_path, IDS)


def test_adapter_row_holds_keys_then_values_of_each_block():
    config = tiny.tiny_config("llama")
    keys = torch.arange(2 * 2 * 3 * 16.0).reshape(2, 2, 3, 16)  # blocks, heads, tokens, channels
    values = keys + 1000
    files = adapter_files(keys, values, config)
    settings = json.loads(files["adapter_config.json"])
    assert (settings["num_virtual_tokens"], settings["num_layers"], settings["token_dim"]) == (3, 2, 32)
    from safetensors.torch import load

    rows = load(files["adapter_model.safetensors"])["prompt_embeddings"].view(3, 2, 2, 2, 16)
    for token in range(3):
        for block in range(2):
            assert torch.equal(rows[token, block, 0], keys[block, :, token])
            assert torch.equal(rows[token, block, 1], values[block, :, token])
