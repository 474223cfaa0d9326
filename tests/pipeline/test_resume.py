"""Runs that end early go on: killed, interrupted, failed, or with a damaged artifact in their store."""

import json
import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
import tiny
from disturbed import SLOW
from processes import MARK, end_marked, marked
from waiting import wait_until

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.outcome import RunFailedError
from prefixquant.pipeline.run import RunOptions, run_recipe

BLOCKS = 8


def stored_blocks(world) -> dict[str, int]:
    """Return key -> time of publishing of the blocks that are stored."""
    found = {}
    for path in world.store_path.glob("artifacts/*/*/manifest.json"):
        with suppress(FileNotFoundError):  # of a stream that has served
            if json.loads(path.read_text())["meta"]["task"] == "block":
                found[path.parent.name] = path.stat().st_mtime_ns
    return found


@pytest.fixture
def many(world):
    """The world with many blocks and a search of some seconds."""
    tiny.write_tiny_model(world.model, blocks=BLOCKS)
    return world


@pytest.fixture
def started(many):
    """`prefixquant run` as a process group of its own, stopped in the middle of the blocks; and its mark."""
    mark = uuid.uuid4().hex
    command = [Path(sys.executable).with_name("prefixquant"), "run", many.recipe_file(SLOW), "--store", many.store_path]
    driver = subprocess.Popen(
        [*map(str, command), "--cpus", "2", "--json"],
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(stored_blocks(many)) >= 2 or driver.poll() is not None, seconds=240)
        assert driver.poll() is None, driver.communicate()
        yield driver, mark
    finally:
        end_marked(mark)
        driver.wait()


def go_on(many):
    """Run the recipe again and return its summary and the blocks that ran."""
    before = stored_blocks(many)
    planned = many.plan(SLOW)
    summary = many.run(SLOW, tracking=None)
    after = stored_blocks(many)
    assert {key: after[key] for key in before} == before  # what was stored has not been touched
    assert summary.tasks_run == len(planned.names("run"))
    return summary, after.keys() - before.keys()


def mlflow_runs(world):
    client = mlflow.MlflowClient(f"sqlite:///{world.store_path}/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("prefixquant").experiment_id])


def block_steps(world):
    client, (run,) = mlflow_runs(world)
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, "block/error"))


def test_a_killed_run_leaves_no_process_and_goes_on_to_the_result_of_an_undisturbed_one(many, started):
    driver, mark = started
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # seconds as a rule; Ray notices its driver's death late on a busy machine
    wait_until(lambda: not marked(mark), seconds=240, shown=lambda: marked(mark))
    stored = stored_blocks(many)
    assert 2 <= len(stored) < BLOCKS
    summary, built = go_on(many)
    assert len(built) == BLOCKS - len(stored)

    undisturbed = run_recipe(many.recipe(SLOW), RunOptions(store=str(many.folder / "other"), tracking="off"))
    other = ArtifactStore(str(many.folder / "other"))
    assert undisturbed.run_id == summary.run_id
    assert other.read_ref(summary.run_id)["keys"] == many.store.read_ref(summary.run_id)["keys"]
    for each, wanted in zip(summary.record["perplexity"], undisturbed.record["perplexity"], strict=True):
        assert each["ppl"] == pytest.approx(wanted["ppl"], rel=1e-9)

    _, (run,) = mlflow_runs(many)
    assert run.info.status == "FINISHED"
    assert block_steps(many) == list(range(BLOCKS))  # also of blocks whose metrics died with the driver


def test_an_interrupted_run_ends_cleanly_and_goes_on(many, started):
    driver, mark = started
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    stdout, stderr = driver.communicate(timeout=120)
    assert driver.returncode == 1
    # One line of ours; Ray's own may come between where it is busy.
    assert stderr.count("interrupted; finished tasks are stored") == 1, stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    wait_until(lambda: not marked(mark), seconds=240, shown=lambda: marked(mark))
    _, (run,) = mlflow_runs(many)
    assert run.info.status == "KILLED"
    assert many.store.read_ref(run.data.tags["run_id"])["status"] == "interrupted"
    stored = stored_blocks(many)
    summary, built = go_on(many)
    assert len(built) == BLOCKS - len(stored)
    assert summary.run_id == run.data.tags["run_id"]
    _, (run,) = mlflow_runs(many)
    assert run.info.status == "FINISHED"
    assert block_steps(many) == list(range(BLOCKS))


def test_a_failed_run_keeps_what_is_done_and_goes_on_as_the_same_mlflow_run(done, capsys):
    change = "quantize.weights.bits=3"
    keys = done.keys(change)
    obstacle = done.store_path / "artifacts" / keys["block[1]"][:2] / keys["block[1]"]
    obstacle.parent.mkdir(exist_ok=True)
    obstacle.write_text("where the artifact's folder should be")
    with pytest.raises(RunFailedError, match=r"block\[1\] failed \(artifact .*cannot publish") as failed:
        done.run(change, tracking=None)
    assert "run again" in str(failed.value)
    assert "block[1] failed" in capsys.readouterr().err
    assert done.store.has(keys["block[0]"])
    _, (run,) = mlflow_runs(done)
    assert run.info.status == "FAILED"
    obstacle.unlink()
    assert {"block[1]", "report"} <= set(done.plan(change).names("run"))
    assert "block[0]" in done.plan(change).names("cached")
    summary = done.run(change, tracking=None)
    _, (again,) = mlflow_runs(done)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert block_steps(done) == [0, 1]
    assert done.store.read_ref(summary.run_id)["status"] == "finished"


def test_a_damaged_block_is_named_and_built_again_alone(done, capsys):
    key = done.keys()["block[1]"]
    (path,) = (done.store_path / "artifacts" / key[:2] / key).glob("*/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(255 - byte for byte in whole[-8:]))
    others = {path: path.stat().st_mtime_ns for path in done.store_path.glob("artifacts/*/*/manifest.json")}
    more = "evaluate.max_windows=3"  # has to read the blocks
    summary = done.run(more)
    message = capsys.readouterr().err
    assert "an input is damaged and is built again" in message
    assert key in message
    (again,) = (done.store_path / "artifacts" / key[:2] / key).glob("*/*.safetensors")
    assert again.read_bytes() == whole
    rebuilt = {path.parent.name for path, when in others.items() if path.exists() and path.stat().st_mtime_ns != when}
    assert rebuilt == {key}
    # Tokens, two evaluations and the report of the new recipe; the block and the two streams in front of it.
    assert summary.tasks_run == 4 + 3
