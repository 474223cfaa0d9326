"""Training inside the graph: which nodes there are, what they yield, and what follows from it."""

import json
import math

import pytest
from inline import run_inline

from prefixquant.pipeline.artifacts import TENSORS, load_artifact
from prefixquant.pipeline.build import targets
from prefixquant.pipeline.evaluation import evaluate_model
from prefixquant.pipeline.graph import Graph, GraphError, Node
from prefixquant.pipeline.materialize import materialize
from prefixquant.pipeline.outcome import RunFailedError
from prefixquant.pipeline.runner import execute
from prefixquant.pipeline.training import TRAINED
from prefixquant.tasks.errors import ConfigError, NumericalError

TRAIN = (
    "train={epochs: 4, sequences: 8, validation_sequences: 4, sequence_length: 32, batch_size: 2, "
    "scale_learning_rate: 0.02, weight_learning_rate: 0.02, relative_learning_rates: true, precision: fp32}"
)
UNMEASURED = "evaluate.texts=[]"


def digests(world, *overrides):
    """Return the digests of the tensors of the final blocks."""
    graph = world.graph(*overrides)
    return [
        world.store.manifest(graph.key(name)).files[TENSORS].sha256 for name in graph.nodes["export"].inputs["blocks"]
    ]


def records(world, *overrides):
    graph = world.graph(*overrides)
    return [load_artifact(world.store, graph.key(name)).record for name in graph.nodes["export"].inputs["blocks"]]


def test_a_trained_recipe_adds_its_windows_its_segments_and_what_they_yield(done):
    plain, graph = done.graph(), done.graph(TRAIN)
    added = graph.nodes.keys() - plain.nodes.keys()
    assert added == {
        "tokens[train]", "tokens[validation]", "train[0]", "trained[0]", "trained[1]",
        "evaluate[quantized,evaluation.jsonl]/untrained",
    }  # fmt: skip
    trained = ("trained[0]", "trained[1]")
    for name in ("export", "evaluate[quantized,evaluation.jsonl]", "report"):
        assert graph.nodes[name].inputs["blocks"] == trained
    assert graph.nodes["evaluate[quantized,evaluation.jsonl]/untrained"].inputs["blocks"] == ("block[0]", "block[1]")
    assert {graph.key(name) == plain.key(name) for name in ("block[0]", "block[1]", "prefix")} == {True}
    assert graph.nodes["train[0]"].estimate.seconds > 0
    assert set(trained) <= set(targets(graph))
    assert "evaluate[quantized,evaluation.jsonl]/untrained" not in done.graph(TRAIN, "evaluate.untrained=false").nodes
    assert "tokens[validation]" not in done.graph(TRAIN, "train.validation_sequences=0").nodes


def test_what_only_says_how_to_work_changes_no_key(done):
    before = done.keys(TRAIN)
    assert done.keys(TRAIN, "train.checkpoint_seconds=5", "train.offload_to_disk=true") == before
    assert done.recipe(TRAIN).train.sharding == "rows"
    assert done.keys(TRAIN, "train.sharding=zero") == before
    assert done.keys(TRAIN, "train.epochs=5")["trained[0]"] != before["trained[0]"]


def test_the_place_of_gptq_is_the_search_or_the_end_of_training(done):
    nearest = done.keys()
    assert done.keys("gptq={}")["block[0]"] != nearest["block[0]"]
    assert done.keys(TRAIN, "gptq={}")["block[0]"] == nearest["block[0]"]
    assert done.keys(TRAIN, "gptq={training: start}")["block[0]"] != nearest["block[0]"]
    with pytest.raises(ConfigError, match=r"quantize\.weights is off; set gptq=off"):
        done.recipe("gptq={}", "quantize.weights=off")


def test_what_segments_cost_is_measured_against_training_in_sequence(done):
    change = (TRAIN, "train.segments=2", "evaluate.sequential=true")
    graph, plain = done.graph(*change), done.graph(TRAIN)
    sequential = "evaluate[quantized,evaluation.jsonl]/sequential"
    assert graph.nodes[sequential].inputs["blocks"] == ("trained[0]/sequential", "trained[1]/sequential")
    for block in (0, 1):  # a run without segments has them already
        assert graph.key(f"trained[{block}]/sequential") == plain.key(f"trained[{block}]")
    with pytest.raises(ConfigError, match=r"evaluate\.sequential .* there are no segments"):
        done.recipe(TRAIN, "evaluate.sequential=true")
    run_inline(done.recipe(*change), done.store)
    report = load_artifact(done.store, graph.key("report"))
    ppl = {each["model"]: each["ppl"] for each in report.record["perplexity"]}
    said = f"from {ppl['quantized, trained in sequence']:.2f} to {ppl['quantized']:.2f}"
    assert said in report.files["report.md"].decode()


def test_more_segments_than_blocks_are_refused(done):
    with pytest.raises(ConfigError, match=r"train\.segments 3 is more than the model's 2 blocks"):
        done.graph(TRAIN, "train.segments=3")


def test_a_node_that_cannot_run_needs_one_that_yields_it():
    with pytest.raises(GraphError, match=r"no node yields 'trained\[0\]'"):
        Graph([Node(name="trained[0]", task=TRAINED)]).check()


@pytest.mark.parametrize("rounding", ["gptq=off", "gptq={}", "gptq={training: start}"])
def test_training_lowers_the_losses_and_its_model_reloads(done, rounding):
    graph, _, _ = run_inline(done.recipe(TRAIN, rounding), done.store)
    report = load_artifact(done.store, graph.key("report")).record
    for block in report["training"]["blocks"]:
        assert block["loss_after"] < block["loss_before"]
    ppl = {each["model"]: each["ppl"] for each in report["perplexity"]}
    assert set(ppl) == {"full precision", "quantized", "quantized without training"}
    assert all(math.isfinite(each) for each in ppl.values())
    out = done.folder / "out"
    materialize(graph, done.store, out, 2)
    reloaded = evaluate_model(str(out), str(done.text), window=32, max_windows=4)["ppl"]
    assert reloaded == pytest.approx(ppl["quantized"], rel=1e-4)  # batched otherwise, in float32


def test_gptq_is_recorded_beside_rounding_to_nearest(done):
    graph, _, _ = run_inline(done.recipe("gptq={}", UNMEASURED), done.store)
    for record in (load_artifact(done.store, graph.key(f"block[{block}]")).record for block in (0, 1)):
        assert record["error"] != record["error_nearest"]


def test_segments_train_at_the_same_time_and_polish_starts_from_what_they_found(done, ray_session):
    change = (TRAIN, UNMEASURED, "train.segments=2", "train.polish=true")
    graph, events = done.graph(*change), []
    assert execute(graph, targets(graph), done.store, ray_session, on_event=events.append).ok
    ends = [(event.kind, event.node) for event in events if event.task == "train" and event.kind != "progress"]
    assert sorted(ends[:2]) == [("submitted", "train[0]"), ("submitted", "train[1]")]
    segments = [load_artifact(done.store, graph.key(f"trained[{block}]")).record for block in (0, 1)]
    polished = records(done, *change)
    assert graph.nodes["export"].inputs["blocks"] == ("polished[0]", "polished[1]")
    # The first block sees the same stream in both, so the second run begins where the first ended.
    assert polished[0]["loss_before"] == pytest.approx(segments[0]["loss_after"], rel=1e-3)


def test_progress_comes_while_a_block_is_trained(done, ray_session):
    graph, events = done.graph(TRAIN, UNMEASURED), []
    assert execute(graph, targets(graph), done.store, ray_session, on_event=events.append).ok
    epochs = [event for event in events if event.kind == "progress"]
    assert [event.step for event in epochs] == list(range(1, 9))  # 2 blocks of 4 epochs
    assert epochs[0].message.startswith("block 0 epoch 1/4: loss ")
    assert set(epochs[0].metrics) == {"loss", "validation_loss", "gradient_norm", "epoch_seconds", "peak_device_gb"}
    assert [event.node for event in events if event.kind == "done" and event.task == "trained"] == [
        "trained[0]", "trained[1]",
    ]  # fmt: skip


def test_a_damaged_trained_block_is_trained_again_alone(done):
    done.run(TRAIN, UNMEASURED)
    before, keys = digests(done, TRAIN, UNMEASURED), done.keys(TRAIN, UNMEASURED)
    folders = [done.store_path / "artifacts" / keys[name][:2] / keys[name] for name in ("trained[0]", "trained[1]")]
    kept = (folders[0] / "manifest.json").stat().st_mtime_ns
    (path,) = folders[1].glob(f"*/{TENSORS}")
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    done.run(TRAIN, "evaluate.max_windows=3")  # has to read the blocks
    assert digests(done, TRAIN, UNMEASURED) == before
    assert (folders[0] / "manifest.json").stat().st_mtime_ns == kept


def test_training_that_diverges_twice_names_block_epoch_and_step(done):
    change = "train.weight_learning_rate=1e30"
    with pytest.raises(RunFailedError) as failed:
        done.run(TRAIN, UNMEASURED, change)
    message = str(failed.value)
    assert "train[0] failed" in message
    assert NumericalError.__name__ in message
    assert "block 0: epoch 1" in message
    assert "step " in message
    assert "first attempt at twice the learning rates diverged as well" in message
    assert "lower the learning rate" in message
    assert "trained[0]" not in message  # one failure, not one a block


def test_mlflow_holds_every_epoch_once(done):
    import mlflow

    summary = done.run(TRAIN, UNMEASURED, tracking=None)
    done.run(TRAIN, UNMEASURED, tracking=None)
    client = mlflow.MlflowClient(f"sqlite:///{done.store_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("prefixquant").experiment_id])
    assert summary.tracking_failures == ()

    def steps(name):
        return sorted(point.step for point in client.get_metric_history(run.info.run_id, name))

    for name in ("loss", "validation_loss", "gradient_norm", "epoch_seconds", "peak_device_gb"):
        assert steps(f"train/{name}") == list(range(1, 9))
    for name in ("loss_before", "loss_after", "best_epoch", "error"):
        assert steps(f"block/{name}") == [0, 1]
    assert json.dumps(summary.to_json())
