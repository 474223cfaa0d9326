"""The prefix in three carriers: safetensors, a PEFT prefix-tuning adapter, and a tokenizer that puts its tokens first.

Letters: L blocks, H KV heads, P prefix tokens, C channels of a head.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.model.sites import head_size

ADAPTER = "prefix-adapter"
"""Folder of the PEFT adapter."""

TOKENIZER = "prefix-tokenizer"
"""Folder of the tokenizer that puts the prefix in front, where the main one does not."""

TEMPLATE_ID = "<prefix>"
_TOKENIZER_CONFIG, _TOKENIZER, _CHAT = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"


def adapter_files(keys_LHPC: Tensor, values_LHPC: Tensor, config: PretrainedConfig) -> dict[str, bytes]:
    """Return the files of an adapter folder that `peft.PeftModel.from_pretrained` loads.

    Row p of its embedding holds for each block the keys, then the values of prefix token p, head by head; keys are as
    the cache holds them, behind the rotary embedding.
    """
    blocks, heads, tokens, channels = keys_LHPC.shape
    stacked = torch.stack([keys_LHPC, values_LHPC], dim=1)  # [L, 2, H, P, C]
    embedding = stacked.permute(3, 0, 1, 2, 4).reshape(tokens, blocks * 2 * heads * channels).contiguous()
    settings: dict[str, Any] = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "prefix_projection": False,
        "num_virtual_tokens": tokens,
        "num_layers": blocks,
        "num_attention_heads": heads,
        "token_dim": heads * head_size(config),
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * head_size(config),
    }
    return {
        "adapter_config.json": _json(settings),
        "adapter_model.safetensors": save({"prompt_embeddings": embedding}, metadata={"format": "pt"}),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def put_prefix_first(folder: Path, token_ids: list[int]) -> bool:
    """Make the tokenizer in a folder put the prefix in front of every text; return whether of every chat as well.

    A special token that its template had before (BOS) gives way: the prefix ends with it. A chat template is text, so
    it can carry the prefix only if the tokens' text is tokenized to the same tokens again; else it is left as it is.

    Raises:
        ConfigError: there is no tokenizer.json, or the tokenizer built from it does not put the prefix first.
    """
    path = folder / _TOKENIZER
    if not path.is_file():
        raise ConfigError(f"{folder}: the tokenizer has no {_TOKENIZER}, in which a prefix can be written")
    data = json.loads(path.read_text(encoding="utf-8"))
    plain = AutoTokenizer.from_pretrained(folder)
    data["post_processor"] = _with_template(data.get("post_processor"), _template(token_ids, plain))
    path.write_bytes(_json(data))
    settings = json.loads((folder / _TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    for name in ("add_bos_token", "add_eos_token"):  # would have transformers write a template of its own
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    in_chats = _patch_chat_template(folder, settings, plain, token_ids)
    (folder / _TOKENIZER_CONFIG).write_bytes(_json(settings))
    _check(folder, token_ids, plain, in_chats)
    return in_chats


def _template(token_ids: list[int], tokenizer: Any) -> dict[str, Any]:
    first: dict[str, Any] = {"SpecialToken": {"id": TEMPLATE_ID, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB")]
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {TEMPLATE_ID: {"id": TEMPLATE_ID, "ids": token_ids, "tokens": tokens}},
    }


def _with_template(processor: dict[str, Any] | None, template: dict[str, Any]) -> dict[str, Any]:
    """Return the post-processor with this template in place of the one it has, or after what it does."""
    if processor is None or processor["type"] == "TemplateProcessing":
        return template
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    return {
        "type": "Sequence",
        "processors": [*(step for step in steps if step["type"] != "TemplateProcessing"), template],
    }


def _patch_chat_template(folder: Path, settings: dict[str, Any], tokenizer: Any, token_ids: list[int]) -> bool:
    text = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if tokenizer(text, add_special_tokens=False).input_ids != token_ids:
        return False
    first = "{{- " + json.dumps(text, ensure_ascii=False) + " }}"
    path = folder / _CHAT
    if path.is_file():
        path.write_text(first + path.read_text(encoding="utf-8"), encoding="utf-8")
        return True
    if isinstance(settings.get("chat_template"), str):
        settings["chat_template"] = first + settings["chat_template"]
        return True
    return False


def _check(folder: Path, token_ids: list[int], plain: Any, in_chats: bool) -> None:
    """Raise ConfigError unless the tokenizer, loaded anew, puts the prefix first."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Rome was not built in a day."
    wanted = token_ids + plain(text, add_special_tokens=False).input_ids
    found = {"text": (wanted, tokenizer(text).input_ids)}
    if in_chats:
        chat = [{"role": "user", "content": text}]
        rendered = plain.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found["chat"] = (
            token_ids + plain(rendered, add_special_tokens=False).input_ids,
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False),
        )
    for kind, (wanted, given) in found.items():
        if wanted != given:
            raise ConfigError(
                f"{folder}: the tokenizer cannot be made to put the prefix {token_ids} in front of a {kind}: "
                f"it gives {given[: len(token_ids) + 3]}..., wanted {wanted[: len(token_ids) + 3]}..."
            )
