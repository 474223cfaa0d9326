"""`prefixquant compare`: runs of a store side by side."""

import pytest
from lm_eval_tasks import write_tasks

from prefixquant.pipeline.compare import compare_runs, comparison
from prefixquant.tasks.errors import ConfigError


@pytest.fixture(scope="module")
def compared(finished_copy):
    """A store with the finished run, one at 8 bits with a task, and one on another text."""
    world = finished_copy
    folder = write_tasks(world.folder / "tasks", documents=10)
    other = world.folder / "other.txt"
    other.write_text(world.text.read_text())
    eight = world.run(
        "name=eight", "quantize.activations.bits=8", "evaluate.tasks=[choice]", f"evaluate.task_folder={folder}"
    )
    elsewhere = world.run(
        "name=elsewhere", "quantize.keys=off", f"evaluate.texts=[{other}]", "evaluate.full_precision=false"
    )
    return world, world.run().run_id, eight.run_id, elsewhere.run_id


def rows(world, *names):
    return dict(comparison(compare_runs(str(world.store_path), names)))


def test_runs_stand_side_by_side_also_on_different_texts(compared):
    world, first, eight, elsewhere = compared
    found = rows(world, first, eight, elsewhere)
    assert found["bits"] == ["W4 A4 K4 V4 static", "W4 A8 K4 V4 static", "W4 A4 K16 V4 static"]
    assert found["training"] == ["none"] * 3
    assert found["prefix"] == ["'<s>'"] * 3
    assert [bool(value) for value in found["ppl evaluation.jsonl, quantized"]] == [True, True, False]
    assert [bool(value) for value in found["ppl other.txt, quantized"]] == [False, False, True]
    assert found["ppl evaluation.jsonl, full precision"][0] == found["ppl evaluation.jsonl, full precision"][1]
    assert " ± " in found["choice acc, quantized"][1]
    assert found["choice acc, quantized"][::2] == ["", ""]
    assert found["status"] == ["finished"] * 3
    assert all(value.endswith(" MB") for value in found["size"])


def test_size_is_that_of_the_folder_a_run_writes(compared):
    world, first, *_ = compared
    out = world.folder / "out"
    world.run(out=out)
    (record,) = compare_runs(str(world.store_path), [first])
    assert record["export_bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert record["seconds"] > 0


def test_a_run_is_found_by_its_beginning_and_by_its_recipe(compared):
    world, first, eight, _ = compared
    found = compare_runs(str(world.store_path), [first[:-2], "eight"])
    assert [each["run_id"] for each in found] == [first, eight]


@pytest.mark.parametrize(("name", "message"), [("nobody", "no run or recipe is called so"), ("e", "2 runs begin so")])
def test_what_is_not_one_run_is_refused(compared, name, message):
    world, *_ = compared
    with pytest.raises(ConfigError, match=f"compare {name}: {message}"):
        compare_runs(str(world.store_path), [name])


def test_a_run_that_has_not_ended_is_shown_with_what_it_has(compared):
    world, first, *_ = compared
    ref = world.store.read_ref(first)
    keys = {name: key for name, key in ref["keys"].items() if name not in ("report", "export")}
    world.store.write_ref("unfinished", ref | {"status": "failed", "keys": keys})
    found = rows(world, "unfinished")
    assert found["status"] == ["failed"]
    assert found["size"] == [""]
    assert found["prefix"] == [""]
