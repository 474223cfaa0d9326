"""Whole runs: what they give, what a second one reuses, and what MLflow holds of them."""

import json
import math
import shutil

import mlflow
import pytest
import tiny

from prefixquant.pipeline.evaluation import evaluate_model
from prefixquant.pipeline.materialize import OutputError
from prefixquant.pipeline.recipe import parse_recipe
from prefixquant.pipeline.run import RunOptions, run_recipe
from prefixquant.pipeline.tracking import flatten

RELOAD_TOLERANCE = 1e-4  # the saved model runs whole and batched otherwise, in float32


def perplexities(summary):
    """Return model -> perplexity of a run with one text."""
    return {each["model"]: each["ppl"] for each in summary.record["perplexity"]}


def reloaded(world, out):
    return evaluate_model(str(out), str(world.text), window=32, max_windows=4)["ppl"]


def tracked(world, summary):
    """Return MLflow's client and its run."""
    client = mlflow.MlflowClient(f"sqlite:///{world.store_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("prefixquant").experiment_id])
    return client, next(run for run in found if run.data.tags["run_id"] == summary.run_id)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_run_measures_three_models_and_saves_the_quantized_one(world, model_type):
    if model_type != "llama":
        shutil.rmtree(world.model)
        tiny.write_tiny_model(world.model, model_type, blocks=3, sharded=True)
    out = world.folder / "out"
    summary = world.run("evaluate.without_prefix=true", out=out)
    ppl = perplexities(summary)
    assert set(ppl) == {"full precision", "quantized", "quantized without prefix"}
    assert all(math.isfinite(each) for each in ppl.values())
    assert len(set(ppl.values())) == 3
    assert reloaded(world, world.model) == pytest.approx(ppl["full precision"], rel=RELOAD_TOLERANCE)
    assert reloaded(world, out) == pytest.approx(ppl["quantized"], rel=RELOAD_TOLERANCE)
    assert summary.record["prefix"]["token_ids"][-1] == tiny.BOS
    assert summary.out == str(out)


def test_eight_bits_everywhere_are_close_to_full_precision(done):
    # Both without a prefix, which alone makes the text another one to a random model.
    bits = [f"quantize.{group}.bits=8" for group in ("weights", "activations", "keys", "values")]
    ppl = perplexities(done.run("prefix.tokens=[]", *bits))
    assert ppl["quantized"] == pytest.approx(ppl["full precision"], rel=0.02)
    assert ppl["quantized"] != ppl["full precision"]


ASYMMETRIC = [f"quantize.{group}.symmetric=false" for group in ("weights", "activations", "keys", "values")]
DYNAMIC = [
    "quantize.activations={mode: dynamic, granularity: token}",
    "quantize.keys={mode: dynamic, granularity: head}",
    "quantize.values={mode: dynamic, granularity: token}",
]
GROUPS = [
    "quantize.weights={granularity: group, group_size: 16}",
    "quantize.activations={granularity: group, group_size: 16}",
    "quantize.keys={granularity: group, group_size: 8}",
    "quantize.values={mode: dynamic, granularity: group, group_size: 4}",
]
VARIANTS = {
    "weights-off": ["quantize.weights=off"],
    "activations-off": ["quantize.activations=off"],
    "cache-off": ["quantize.keys=off", "quantize.values=off"],
    "nothing-quantized": [f"quantize.{group}=off" for group in ("weights", "activations", "keys", "values")],
    "keys-before-rope": ["quantize.keys.before_rope=true", "rotate.r3=off"],
    "dynamic": DYNAMIC,
    "groups": GROUPS,
    "asymmetric": ASYMMETRIC,
    "not-rotated": ["rotate.r1=off", "rotate.r2=off", "rotate.r3=off", "rotate.r4=off"],
    "no-search": ["search=off"],
    "no-prefix": ["prefix.tokens=[]"],
    "given-prefix": ["prefix.tokens=[9, 4, 0]"],
    "bfloat16": ["model.dtype=bfloat16"],
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_kind_of_recipe_runs_and_its_model_reloads(done, overrides):
    out = done.folder / "out"
    summary = done.run("evaluate.full_precision=false", *overrides, out=out)
    # bfloat16: the saved model's sums are rounded in another order
    tolerance = 2e-2 if "model.dtype=bfloat16" in overrides else RELOAD_TOLERANCE
    assert reloaded(done, out) == pytest.approx(perplexities(summary)["quantized"], rel=tolerance)


def test_a_model_that_nothing_quantizes_is_the_original(done):
    ppl = perplexities(done.run(*VARIANTS["nothing-quantized"], "prefix.tokens=[]"))
    assert ppl["quantized"] == pytest.approx(ppl["full precision"], rel=RELOAD_TOLERANCE)


def test_a_recipe_without_texts_still_saves_a_model(done):
    out = done.folder / "out"
    summary = done.run("evaluate.texts=[]", out=out)
    assert summary.record["perplexity"] == []
    assert math.isfinite(reloaded(done, out))


def test_a_second_run_runs_nothing_and_is_the_same_run(world):
    planned = world.plan()
    first, second = world.run(), world.run()
    assert first.tasks_run == len(planned.names("run"))
    assert (first.tasks_cached, second.tasks_run) == (0, 0)
    assert second.tasks_cached > 0
    assert (second.run_id, second.record) == (first.run_id, first.record)


def test_other_activation_bits_run_the_blocks_and_what_follows(done):
    change = "quantize.activations.bits=8"
    planned = done.plan(change)
    blocks = {f"{task}[{block}]" for task in ("stream", "block") for block in (0, 1)}
    rebuilt = blocks | {"export", "evaluate[quantized,evaluation.jsonl]", "report"}
    assert set(planned.names("run")) == rebuilt
    assert done.run(change).tasks_run == len(rebuilt)


def test_another_seed_rotates_and_draws_windows_anew_and_keeps_the_rest(done):
    planned = done.plan("seed=1")
    assert {"rotate[ends]", "rotate[0]", "rotate[1]", "tokens[statistics]", "prefix"} <= set(planned.names("run"))
    kept = {"load", "evaluate[full_precision,evaluation.jsonl]"}
    assert kept <= set(planned.names("cached"))
    assert done.run("seed=1").tasks_run == len(planned.names("run"))


def test_a_model_and_a_store_that_moved_cost_nothing(done):
    first, keys = done.run(), done.keys()
    shutil.move(done.model, done.folder / "moved")
    shutil.copytree(done.store_path, done.folder / "copy")
    shutil.rmtree(done.store_path)
    done.model, done.store_path = done.folder / "moved", done.folder / "copy"
    assert done.keys() == keys
    second = done.run(out=done.folder / "out")
    assert (second.tasks_run, second.run_id) == (0, first.run_id)
    assert reloaded(done, done.folder / "out") == pytest.approx(perplexities(first)["quantized"], rel=1e-4)


def test_an_output_folder_is_replaced_if_it_is_ours_and_refused_before_anything_runs_if_not(done):
    out = done.folder / "out"
    done.run("evaluate.texts=[]", out=out)
    done.run("evaluate.texts=[]", "quantize.weights.bits=8", out=out)
    assert json.loads((out / "prefixquant.json").read_text())["quantize"]["weights"]["bits"] == 8
    assert sorted(path.name for path in done.folder.glob(".out*")) == []
    with pytest.raises(OutputError, match="holds other files"):
        done.run("seed=5", out=done.model)
    assert "rotate[0]" in done.plan("seed=5").names("run")


def test_a_run_whose_output_cannot_be_written_is_recorded_as_failed_and_goes_on(done):
    blocker = done.folder / "blocker"
    blocker.write_text("no folder")
    with pytest.raises(OutputError, match="cannot be written"):
        done.run("evaluate.texts=[]", out=blocker / "out")
    assert "failed" in {done.store.read_ref(run)["status"] for run in done.store.run_ids()}
    blocker.unlink()
    assert done.run("evaluate.texts=[]", out=blocker / "out").tasks_run == 0


def test_mlflow_holds_recipe_block_errors_perplexities_costs_and_keys(world):
    summary = world.run(tracking=None)
    client, run = tracked(world, summary)
    assert summary.tracking_failures == ()
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in flatten(world.recipe().resolved()).items()}
    points = client.get_metric_history(run.info.run_id, "block/error")
    assert sorted((point.step, point.value) for point in points) == [
        (block, pytest.approx(each["error"])) for block, each in enumerate(summary.record["blocks"])
    ]
    assert run.data.metrics["eval/evaluation.jsonl_ppl/quantized"] == pytest.approx(perplexities(summary)["quantized"])
    assert run.data.metrics["eval/evaluation.jsonl_ppl/full_precision"] == pytest.approx(
        perplexities(summary)["full precision"]
    )
    assert run.data.metrics["seconds/block"] > 0
    assert run.data.metrics["memory/peak_host_gb"] > 0
    keys = world.keys()
    for name in ("load", "prefix", "export", "report"):
        assert run.data.tags[f"artifact.{name}"] == keys[name]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"recipe.json", "report.json", "report.md"}
    # The second run of the recipe is the same run, and its record stays as it was.
    world.run(tracking=None)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    # Another recipe that finds the blocks in the store has its metrics all the same.
    other = world.run("evaluate.max_windows=2", tracking=None)
    _, run = tracked(world, other)
    points = client.get_metric_history(run.info.run_id, "block/error")
    assert sorted(point.step for point in points) == [0, 1]


def test_a_tracking_server_out_of_reach_is_reported_and_costs_no_result(done, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    summary = done.run("evaluate.texts=[]", tracking="http://127.0.0.1:9")
    assert any("127.0.0.1:9" in failure for failure in summary.tracking_failures)
    assert summary.tasks_run > 0


@pytest.mark.real_model
def test_smollm2_quantizes_with_a_prefix_that_ends_in_bos(smollm2, world):
    recipe = parse_recipe(
        {
            "name": "smollm2",
            "model": {"source": str(smollm2)},
            "data": {
                "calibration": "python-docs",
                "statistics": {"sequences": 8, "length": 256},
                "search": {"sequences": 1, "length": 256},
            },
            "search": {"coarse_points": 3, "fine_points": 0, "min_ratio": 0.5, "weight_points": 6},
            "evaluate": {"texts": ["python-docs"], "window": 512, "max_windows": 2},
        }
    )
    summary = run_recipe(recipe, RunOptions(store=str(world.store_path)))
    ppl = perplexities(summary)
    assert 0 < ppl["full precision"] < ppl["quantized"] < 10 * ppl["full precision"]
    assert summary.record["prefix"]["token_ids"][-1] == 1
    assert len(summary.record["blocks"]) == 30
    client, run = tracked(world, summary)
    assert run.data.metrics["eval/python-docs_ppl/quantized"] == pytest.approx(ppl["quantized"])
    assert len(client.get_metric_history(run.info.run_id, "block/error")) == 30
