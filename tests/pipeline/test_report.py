from pathlib import Path
from typing import Any

import pytest
import torch

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import publish_artifact
from prefixquant.pipeline.report import LOSSES_FILE, ReportNode, plot_losses, render_report, run_report
from prefixquant.pipeline.worker import LazyInputs, TaskContext
from prefixquant.tasks.artifact import Artifact

PREFIX = {"token_ids": [7, 1], "tokens": ["\n", "<s>"]}
SMALL = {
    "name": "small",
    "prefix": PREFIX,
    "perplexity": [{"model": "quantized", "text": "c4", "ppl": 12.344, "tokens": 99}],
    "blocks": [{"error": 0.25, "error_before_search": 0.5}],
    "training": None,
    "tasks": [],
}
SEARCHED = {"error": 0.25, "error_before_search": 0.5, "search": {}}


def trained(block: int, **more: Any) -> dict[str, Any]:
    return {
        "loss_before": 2.0 + block,
        "loss_after": 0.5,
        "best_epoch": 2,
        "epochs": [{"epoch": epoch, "seconds": 1.5} for epoch in (1, 2, 3)],
        "learning_rate_factor": 1.0,
        "divergence": "",
        **more,
    }


def report(folder: Path, *, segments: int = 1, **records: Any) -> Artifact:
    """Run the report's task on stored records by argument; a list of them where the graph names several nodes."""
    store = ArtifactStore(str(folder))
    keys: dict[str, Any] = {}
    for argument, found in ({"prefix": PREFIX} | records).items():
        entries = found if isinstance(found, list) else [found]
        names = [f"{len(keys):02}{index:02}".ljust(64, "a") for index in range(len(entries))]
        for key, record in zip(names, entries, strict=True):
            publish_artifact(store, key, Artifact(record=record), {})
        keys[argument] = tuple(names) if isinstance(found, list) else names[0]
    config = ReportNode(name="small", texts=("c4",), segments=segments)
    return run_report(TaskContext(config, LazyInputs(store, keys), torch.device("cpu"))).artifact


def test_a_rendered_report_has_prefix_perplexities_and_block_errors():
    text = render_report(SMALL)
    assert text.startswith("# small\n")
    assert r"Prefix: '\n' (7), '<s>' (1)" in text
    assert "| quantized | c4 | 12.34 | 99 |" in text
    assert "| 0 | 0.50000 | 0.25000 |" in text
    assert "best epoch" not in text
    empty = render_report(SMALL | {"prefix": {"token_ids": [], "tokens": []}, "perplexity": []})
    assert "Prefix: none" in empty
    assert "perplexity" not in empty


def test_every_variant_has_a_label_of_its_own(tmp_path):
    measured = {"ppl": 2.0, "tokens": 9}
    nodes = {
        "evaluate[full_precision,c4]": "full precision",
        "evaluate[quantized,c4]": "quantized",
        "evaluate[quantized,a,b]/without_prefix": "quantized without prefix",
        "evaluate[quantized,[1].txt]/untrained": "quantized without training",
        "evaluate[quantized,c4]/sequential": "quantized, trained in sequence",
    }
    found = report(tmp_path, blocks=[SEARCHED], **dict.fromkeys(nodes, measured)).record["perplexity"]
    assert [each["model"] for each in found] == list(nodes.values())
    assert [each["text"] for each in found] == ["c4", "c4", "a,b", "[1].txt", "c4"]


def test_without_training_there_is_neither_table_nor_plot(tmp_path):
    found = report(tmp_path, blocks=[SEARCHED, SEARCHED])
    assert found.record["training"] is None
    assert found.record["blocks"] == [{"error": 0.25, "error_before_search": 0.5}] * 2
    assert set(found.files) == {"report.md"}


def test_trained_blocks_have_their_losses_as_table_record_and_plot(tmp_path):
    found = report(tmp_path, blocks=[trained(0), trained(1)], searched=[SEARCHED, SEARCHED])
    text = found.files["report.md"].decode()
    assert "| block | loss before | loss after | best epoch | seconds |" in text
    assert "| 1 | 3 | 0.5 | 2 of 3 | 4.5 |" in text
    assert "| 0 | 0.50000 | 0.25000 |" in text
    assert "segments" not in text
    assert found.record["training"]["segments"] == 1
    assert [each["loss_before"] for each in found.record["training"]["blocks"]] == [2.0, 3.0]
    assert found.files[LOSSES_FILE].startswith(b"\x89PNG")


def test_segments_second_attempts_and_gptq_are_spoken_of(tmp_path):
    divergence = "epoch 2, step 3 of 4: the loss is nan"
    blocks = [trained(0, loss_gptq=0.4), trained(1, loss_gptq=0.3, learning_rate_factor=0.5, divergence=divergence)]
    text = report(tmp_path, segments=2, blocks=blocks, searched=[SEARCHED] * 2).files["report.md"].decode()
    assert "trained in 2 segments" in text
    assert "evaluate.sequential=true" in text
    assert f"Block 1 was trained at 0.5 of the learning rates: {divergence}." in text
    assert "| 1 | 3 | 0.5 | 0.3 | 2 of 3 | 4.5 |" in text


def test_what_segments_cost_is_said_where_it_was_measured(tmp_path):
    evaluated = {"evaluate[quantized,c4]": {"ppl": 11.0, "tokens": 9}}
    evaluated["evaluate[quantized,c4]/sequential"] = {"ppl": 10.0, "tokens": 9}
    found = report(tmp_path, segments=2, blocks=[trained(0)], searched=[SEARCHED], **evaluated)
    text = found.files["report.md"].decode()
    assert "On c4 segments change the perplexity from 10.00 to 11.00 (+10.0 %)." in text
    assert "was not measured" not in text


@pytest.mark.parametrize("blocks", [[trained(0)], [trained(0, loss_after=0.0), trained(1)]], ids=["one", "zero-loss"])
def test_a_plot_is_made_of_one_block_and_of_a_loss_of_zero(blocks):
    first, second = plot_losses(blocks), plot_losses(blocks)
    assert first.startswith(b"\x89PNG")
    assert first == second
