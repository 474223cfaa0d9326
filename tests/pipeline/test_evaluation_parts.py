"""What is measured, cut into parts: the same numbers and keys, and lm-eval's tasks in a run."""

import pytest
from lm_eval_tasks import write_tasks

from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.tracking import list_runs
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.evaluate import BATCH_TOKENS

TASKS = ("evaluate.tasks=[choice,continue]", "evaluate.limit=20")
MANY = ("evaluate.max_windows=null", "evaluate.window=16")


@pytest.fixture
def folder(done):
    return write_tasks(done.folder / "tasks")


def test_parts_change_no_key_but_their_own(done):
    whole, cut = done.keys(*MANY, "evaluate.shards=1"), done.keys(*MANY, "evaluate.shards=3")
    assert {name: key for name, key in cut.items() if "_part[" not in name} == whole
    assert sum("evaluate_part[quantized" in name for name in cut) == 3


def test_parts_are_as_many_as_workers_where_the_recipe_names_none(done):
    parts = [name for name in done.graph(*MANY).nodes if name.startswith("evaluate_part[quantized")]
    assert len(parts) != 1
    one_batch = done.graph("evaluate.max_windows=4", "evaluate.window=32").nodes
    assert not any("_part[" in name for name in one_batch)


def measured(world, graph, node):
    artifact = load_artifact(world.store, graph.key(node))
    return artifact.record, {name: tensor.tolist() for name, tensor in artifact.tensors.items()}, artifact.files


def test_four_parts_give_the_numbers_of_one_to_the_bit(done, folder):
    words = " ".join(f"word {number * 7919 % 997}" for number in range(2000))
    text = done.folder / "long.txt"
    text.write_text(words)
    settings = (*MANY, *TASKS, f"evaluate.task_folder={folder}", "evaluate.full_precision=false")
    settings += (f"evaluate.texts=[{text}]",)
    found = []
    for shards in (4, 1):
        options = (*settings, f"evaluate.shards={shards}")
        summary = done.run(*options)
        graph = done.graph(*options)
        nodes = ["evaluate[quantized,long.txt]", "tasks[quantized,choice]", "tasks[quantized,continue]"]
        found.append([measured(done, graph, node) for node in nodes])
        stored = done.store.keys()
        assert not any(graph.key(name) in stored for name in graph.nodes if "_part[" in name)
        if shards == 4:
            assert summary.tasks_run >= 3 * 5 + 3
            for node in (*nodes, "report"):
                done.store.discard(graph.key(node))
    assert found[0] == found[1]
    assert found[0][0][0]["windows"] > 4 * BATCH_TOKENS / 16, "less than four batches, so parts without windows"


def test_tasks_are_in_report_json_and_mlflow(done, folder):
    settings = (*TASKS, f"evaluate.task_folder={folder}", "evaluate.shards=2", "evaluate.shots=1")
    tracking = f"sqlite:///{done.folder}/mlflow.db"
    summary = done.run(*settings, tracking=tracking)
    assert not summary.tracking_failures
    rows = {(each["model"], each["task"]): each for each in summary.to_json()["tasks"]}
    assert set(rows) == {(m, t) for m in ("full precision", "quantized") for t in ("choice", "continue")}
    assert rows["quantized", "choice"]["documents"] == 20
    assert rows["quantized", "choice"]["shots"] == 1
    (run,) = list_runs(tracking, "prefixquant")
    assert run.metrics["eval/choice_acc/quantized"] == rows["quantized", "choice"]["metrics"]["acc"]
    assert run.metrics["eval/choice_acc_stderr/full_precision"] > 0
    report = load_artifact(done.store, done.graph(*settings).key("report")).files["report.md"].decode()
    assert "| full precision | choice | acc_norm |" in report


def test_a_changed_task_file_is_asked_anew_and_nothing_else(done, folder):
    settings = (*TASKS, f"evaluate.task_folder={folder}")
    before = done.keys(*settings)
    (folder / "examples.jsonl").write_text((folder / "examples.jsonl").read_text() + "\n")
    after = done.keys(*settings)
    changed = {name.partition("[")[0].removesuffix("_part") for name in after if after[name] != before[name]}
    assert changed == {"requests", "tasks", "report"}


def test_requests_are_shared_by_models_and_settings_are_in_their_key(done, folder):
    settings = (*TASKS, f"evaluate.task_folder={folder}")
    keys = done.keys(*settings)
    assert keys["requests[choice]"] == done.keys(*settings, "quantize.activations.bits=8")["requests[choice]"]
    for other in ("evaluate.shots=3", "evaluate.limit=10"):
        assert done.keys(*settings, other)["requests[choice]"] != keys["requests[choice]"]
    moved = folder.rename(done.folder / "elsewhere")
    assert done.keys(*TASKS, f"evaluate.task_folder={moved}") == keys


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("evaluate.tasks=[piqa,piqa]",), "names a task twice"),
        (("evaluate.shots=2",), "evaluate.shots is for tasks"),
        (("evaluate.limit=2",), "evaluate.limit is for tasks"),
        (("evaluate.gpus=2",), "evaluate.gpus is for tasks"),
        (("evaluate.task_folder=x",), "evaluate.task_folder is for tasks"),
        (("evaluate.shards=0",), "evaluate.shards must be at least 1"),
        (("evaluate.tasks=[piqa]", "evaluate.limit=0"), "evaluate.limit must be at least 1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_settings_that_mean_nothing_are_refused(world, overrides, message):
    with pytest.raises(ConfigError, match=message):
        world.recipe(*overrides)


def test_a_folder_without_tasks_is_refused_before_anything_runs(done):
    with pytest.raises(ConfigError, match=r"evaluate\.task_folder .* holds no task"):
        done.run(*TASKS, f"evaluate.task_folder={done.model}")
