"""Tasks of lm-eval over local data: as stock lm-eval has them, in any number of shares, behind a prefix."""

import contextlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_tasks import write_tasks
from torch import Tensor

from prefixquant.tasks.errors import ConfigError, DataError, NumericalError
from prefixquant.tasks.find_prefix import prefix_key_values
from prefixquant.tasks.harness import (
    HarnessConfig,
    answer,
    build_requests,
    check_task_names,
    chunks_of,
    folder_fingerprint,
    score,
)
from prefixquant.tasks.harness_model import PrefixModel
from prefixquant.tasks.model.sites import OnlineTransforms
from prefixquant.tasks.model.spec import ActivationSpec, QuantizeConfig
from prefixquant.tasks.model.whole import build_model, unquantized_logits

PREFIX = (9, 3, tiny.BOS)
UNQUANTIZED = QuantizeConfig(weights=None, activations=None, keys=None, values=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny.tiny_variant("llama")


def behind_prefix(model: Any, prefix: tuple[int, ...], activations: ActivationSpec | None = None) -> Any:
    """Return the same model, its blocks behind the keys and values of the prefix."""
    coarse = {"scale": torch.tensor(0.5), "zero_point": torch.tensor(0.0)}
    sites = dict.fromkeys(("attention_input", "o_input", "mlp_input", "down_input"), coarse)
    blocks, ends = tiny.build_blocks(model), tiny.build_ends(model)
    stored = prefix_key_values(blocks, ends.embedding[torch.tensor(prefix)], device=tiny.CPU) if prefix else None
    return build_model(
        model.config,
        tiny.family_of(model),
        [(tiny.block_weights(model, index), sites) for index in range(len(blocks))],
        ends,
        stored,
        quantize=replace(UNQUANTIZED, activations=activations),
        transforms=OnlineTransforms(r3=False, r4=False),
        devices=[tiny.CPU],
    )


def measure(model: Any, config: HarnessConfig, folder: Path, prefix: tuple[int, ...] = (), shards: int = 1) -> Any:
    requests = build_requests(config, folder)
    served = PrefixModel(model, tiny.tiny_tokenizer(), prefix)
    answers: dict[int, Any] = {}
    for shard in range(shards):
        answers |= answer(served, requests, shard, shards)
    return score(config, requests, answers, folder)


def stock(lm: HFLM, config: HarnessConfig, folder: Path) -> dict[str, float]:
    """Return the numbers of lm-eval's own evaluation."""
    with contextlib.chdir(folder):
        results = simple_evaluate(
            lm,
            tasks=[config.name],
            num_fewshot=config.shots,
            limit=config.limit,
            bootstrap_iters=1000,
            log_samples=False,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )
    assert results is not None
    return results["results"][config.name]


@pytest.mark.parametrize("name", ["choice", "bare", "continue", "whole"])
def test_numbers_are_those_of_stock_lm_eval(original, folder, name):
    config = HarnessConfig(name=name, shots=2 if name == "choice" else None, limit=30)
    wanted = stock(HFLM(pretrained=original, tokenizer=tiny.tiny_tokenizer(), batch_size=4), config, folder)
    (record,) = measure(original, config, folder)
    assert (record["task"], record["documents"], record["limited"]) == (name, 30, True)
    assert record["shots"] == wanted.get("num_fewshot", 2 if name == "choice" else 0)
    assert record["metrics"]
    for metric, value in record["metrics"].items():
        assert value == pytest.approx(wanted[f"{metric},none"], rel=1e-6)
        error = wanted[f"{metric}_stderr,none"]
        assert record["stderr"][metric] == (pytest.approx(error, rel=1e-6) if error != "N/A" else None)


@pytest.mark.parametrize("name", ["choice", "continue", "whole"])
def test_shares_give_the_numbers_of_one_to_the_bit(original, folder, name):
    model = behind_prefix(original, PREFIX)
    config = HarnessConfig(name=name)
    whole = measure(model, config, folder, PREFIX)
    for shards in (2, 4, 7):
        assert measure(model, config, folder, PREFIX, shards) == whole


def test_a_group_has_a_record_of_its_own_and_one_for_each_task(original, folder):
    config = HarnessConfig(name="both", limit=12)
    records = {each["task"]: each for each in measure(original, config, folder, shards=2)}
    assert set(records) == {"both", "choice", "bare"}
    parts = [records[name]["metrics"]["acc"] for name in ("choice", "bare")]
    assert records["both"]["metrics"]["acc"] == pytest.approx(sum(parts) / 2)
    assert (records["choice"],) == tuple(measure(original, HarnessConfig(name="choice", limit=12), folder))


def test_shares_are_disjoint_complete_and_keep_documents_together(folder):
    requests = build_requests(HarnessConfig(name="choice"), folder)
    assert len(requests) == 40 * 3
    for shards in (1, 3, 50):
        shares = [
            [index for _, chunk in chunks_of(requests, shard, shards) for index in chunk] for shard in range(shards)
        ]
        assert Counter(index for share in shares for index in share) == Counter(range(len(requests)))
        documents = [{requests[index].document for index in share} for share in shares]
        assert sum(map(len, documents)) == 40


class Literal(HFLM):
    """Feeds the prefix as tokens, and a start token only as part of it."""

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        rows = []
        for row in inps:
            tokens = row[1:] if row[0] == tiny.BOS else row
            logits = super()._model_call(torch.cat([torch.tensor(PREFIX), tokens])[None])[0]
            rows.append(logits[len(PREFIX) - int(row[0] == tiny.BOS) :])
        return torch.stack(rows)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        front = torch.tensor(PREFIX).expand(len(context), -1)
        settings["attention_mask"] = torch.ones(1, len(PREFIX) + context.shape[1], dtype=torch.long)
        output = super()._model_generate(torch.cat([front, context], 1), max_length + len(PREFIX), stop, **settings)
        return output[:, len(PREFIX) :]


@pytest.mark.parametrize("name", ["choice", "bare", "continue", "whole"])
def test_requests_behind_the_prefix_are_as_if_its_tokens_stood_in_front_once(original, folder, name):
    config = HarnessConfig(name=name)
    literal = Literal(pretrained=original, tokenizer=tiny.tiny_tokenizer(), batch_size=1, add_bos_token=False)
    wanted = stock(literal, config, folder)
    (record,) = measure(behind_prefix(original, PREFIX), config, folder, PREFIX)
    assert record["metrics"] == pytest.approx({m: wanted[f"{m},none"] for m in record["metrics"]}, rel=1e-5)


def test_answers_behind_the_prefix_are_those_of_its_tokens_in_front(original, folder):
    """Accuracies are coarse: this compares log-likelihoods and texts themselves."""
    literal = Literal(pretrained=original, tokenizer=tiny.tiny_tokenizer(), batch_size=1, add_bos_token=False)
    served = PrefixModel(behind_prefix(original, PREFIX), tiny.tiny_tokenizer(), PREFIX)
    for name in ("choice", "bare", "continue", "whole"):
        requests = build_requests(HarnessConfig(name=name, limit=20), folder)
        found = answer(served, requests)
        for index, request in enumerate(requests):
            instance = type("Asked", (), {"args": tuple(request.arguments)})()
            (wanted,) = getattr(literal, request.kind)([instance], disable_tqdm=True)
            if request.kind == "loglikelihood":
                assert found[index] == [pytest.approx(wanted[0], rel=1e-5), wanted[1]]
            else:
                assert found[index] == (pytest.approx(wanted, rel=1e-5) if name == "whole" else wanted)
        assert found != answer(PrefixModel(original, tiny.tiny_tokenizer()), requests)


def test_the_longest_request_leaves_room_for_the_prefix(original):
    tokenizer = tiny.tiny_tokenizer()
    assert PrefixModel(original, tokenizer).max_length == 512
    assert PrefixModel(behind_prefix(original, PREFIX), tokenizer, PREFIX).max_length == 509


def test_bos_is_left_out_only_where_the_prefix_holds_it(original):
    tokenizer = tiny.tiny_tokenizer()
    assert PrefixModel(original, tokenizer).tok_encode("a")[0] == tiny.BOS
    assert PrefixModel(behind_prefix(original, (9, 3)), tokenizer, (9, 3)).tok_encode("a")[0] == tiny.BOS
    assert tiny.BOS not in PrefixModel(behind_prefix(original, PREFIX), tokenizer, PREFIX).tok_encode("a")


def test_unquantized_logits_leave_prefix_and_quantizers_out(original):
    model = behind_prefix(original, PREFIX, ActivationSpec())
    ids = tiny.random_ids(1, 6)[0]
    assert not torch.allclose(model(ids[None]).logits, behind_prefix(original, PREFIX)(ids[None]).logits, atol=0.1)
    torch.testing.assert_close(unquantized_logits(model, ids), original(ids[None]).logits[0, -1])
    assert all(site.enabled for site in model.modules() if hasattr(site, "enabled"))


def test_few_shot_examples_come_in_front_and_are_the_same_each_time(folder):
    plain = build_requests(HarnessConfig(name="choice"), folder)
    shown = build_requests(HarnessConfig(name="choice", shots=2), folder)
    assert shown == build_requests(HarnessConfig(name="choice", shots=2), folder)
    assert all(b.arguments[0].endswith(a.arguments[0]) for a, b in zip(plain, shown, strict=True))
    assert all(len(b.arguments[0]) > len(a.arguments[0]) for a, b in zip(plain, shown, strict=True))


def test_requests_are_plain_json(folder):
    for name in ("choice", "continue", "whole"):
        for request in build_requests(HarnessConfig(name=name, limit=2), folder):
            assert json.loads(json.dumps(request.arguments)) == request.arguments


def test_documents_that_changed_since_are_an_error(original, tmp_path):
    folder = write_tasks(tmp_path / "tasks", documents=4)
    config = HarnessConfig(name="choice")
    requests = build_requests(config, folder)
    answers = answer(PrefixModel(original, tiny.tiny_tokenizer()), requests)
    other = write_tasks(tmp_path / "other", documents=4, seed=1)
    with pytest.raises(DataError, match="task choice: its documents changed"):
        score(config, requests, answers, other)


def test_fingerprint_is_of_contents_not_of_place(tmp_path):
    first, second = write_tasks(tmp_path / "a"), write_tasks(tmp_path / "b")
    before = folder_fingerprint(first)
    assert folder_fingerprint(second) == before
    (first / "__pycache__").mkdir()
    (first / "__pycache__" / "x.pyc").write_text("x")
    assert folder_fingerprint(first) == before
    (first / "choices.jsonl").write_text((first / "choices.jsonl").read_text() + "\n")
    assert folder_fingerprint(first) != before


def test_fingerprint_covers_data_that_lies_elsewhere(tmp_path):
    folder, data = write_tasks(tmp_path / "a"), tmp_path / "data.jsonl"
    data.write_text("{}")
    task = (folder / "choice.yaml").read_text().replace("test: choices.jsonl", f"test: {data}")
    (folder / "choice.yaml").write_text(task)
    before = folder_fingerprint(folder)
    data.write_text("{} ")
    assert folder_fingerprint(folder) != before


def test_wrong_folder_and_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        folder_fingerprint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no task"):
        folder_fingerprint(tmp_path)
    with pytest.raises(ConfigError, match=r"evaluate.shots must not be negative, got -1"):
        HarnessConfig(name="piqa", shots=-1)
    with pytest.raises(ConfigError, match=r"evaluate.limit must be at least 1"):
        HarnessConfig(name="piqa", limit=0)


def test_names_of_a_folder_are_known_without_those_of_lm_eval(folder):
    check_task_names(["choice", "whole"], folder)


def test_nan_is_an_error_with_its_document(original, folder):
    class Broken:
        def answer(self, requests: Any) -> Any:
            return [[float("nan"), False]] * len(requests)

    requests = build_requests(HarnessConfig(name="choice", limit=2), folder)
    with pytest.raises(NumericalError, match="task choice, document 0"):
        answer(Broken(), requests)
