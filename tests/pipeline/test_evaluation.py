"""Models that `eval` loads besides ours: stock ones, with the prefix as an adapter beside them."""

import json

import tiny
import torch

from prefixquant.pipeline.evaluation import load_any
from prefixquant.tasks.find_prefix import prefix_key_values
from prefixquant.tasks.harness import Request
from prefixquant.tasks.harness_model import PrefixModel
from prefixquant.tasks.profiles.prefix import ADAPTER, adapter_files

PREFIX = [9, 3, tiny.BOS]
IDS = tiny.random_ids(2, 10)


def test_a_stock_model_is_measured_behind_the_adapter_beside_it(tmp_path):
    model = tiny.write_tiny_model(tmp_path, blocks=2)
    blocks, ends = tiny.build_blocks(model), tiny.build_ends(model)
    keys, values = prefix_key_values(blocks, ends.embedding[torch.tensor(PREFIX)], device=tiny.CPU)
    (tmp_path / ADAPTER).mkdir()
    for name, content in adapter_files(keys, values, model.config).items():
        (tmp_path / ADAPTER / name).write_bytes(content)
    described = {"format": 1, "export": {"profile": "hf-exact"}, "prefix_token_ids": PREFIX}
    (tmp_path / "prefixquant.json").write_text(json.dumps(described))
    loaded, token_ids = load_any(tmp_path, [tiny.CPU])
    wanted = model(torch.cat([torch.tensor(PREFIX).expand(2, -1), IDS], dim=1)).logits[:, 3:]
    assert token_ids == PREFIX
    with torch.no_grad():
        assert tiny.relative_error(loaded(input_ids=IDS).logits, wanted) < 1e-5
    served = PrefixModel(loaded, tiny.tiny_tokenizer(), token_ids)
    assert served.max_length == 509
    ((likelihood, _),) = served.answer([Request("loglikelihood", ["ab", "cd"], "any", 0)])
    text = [index for index in tiny.tiny_tokenizer()("abcd").input_ids if index != tiny.BOS]
    logits = model(torch.tensor([PREFIX + text])).logits[0].log_softmax(-1)
    assert abs(likelihood - float(logits[4, text[2]] + logits[5, text[3]])) < 1e-4
    asked = [
        Request("generate_until", [text, {"until": ["."], "max_gen_toks": 6}], "any", 0) for text in ("ab", "abcd")
    ]
    for request, written in zip(asked, served.answer(asked), strict=True):
        ids = [index for index in tiny.tiny_tokenizer()(request.arguments[0]).input_ids if index != tiny.BOS]
        front = torch.tensor([PREFIX + ids])
        wanted_ids = model.generate(front, attention_mask=torch.ones_like(front), max_new_tokens=6, do_sample=False)
        wanted_text = tiny.tiny_tokenizer().decode(wanted_ids[0, front.shape[1] :], skip_special_tokens=True)
        assert written == wanted_text.split(".")[0]


def test_a_stock_model_without_adapter_has_no_prefix(tmp_path):
    model = tiny.write_tiny_model(tmp_path, blocks=2)
    loaded, token_ids = load_any(tmp_path, [tiny.CPU])
    assert token_ids == []
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
