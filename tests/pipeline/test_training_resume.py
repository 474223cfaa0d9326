"""Training that is killed goes on where it was and ends in the result of an undisturbed one; so do several ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from inline import run_inline
from processes import descendants

from prefixquant.pipeline.artifacts import TENSORS, load_artifact
from prefixquant.pipeline.build import targets
from prefixquant.pipeline.run import RunOptions, run_recipe
from prefixquant.pipeline.runner import execute
from prefixquant.tasks.errors import ConfigError

EPOCHS = 12
TRAIN = (
    f"train={{epochs: {EPOCHS}, sequences: 32, validation_sequences: 4, sequence_length: 32, batch_size: 2, "
    "scale_learning_rate: 0.005, weight_learning_rate: 0.005, relative_learning_rates: true, precision: fp32, "
    "checkpoint_seconds: 0}"
)
CHANGE = (TRAIN, "evaluate.texts=[]")
"""About a second a block, and a checkpoint after every epoch."""


def manifests(world, task):
    """Return what the manifests of a task's artifacts say, by time of publishing."""
    found = []
    for path in world.store_path.glob("artifacts/*/*/manifest.json"):
        try:
            meta = json.loads(path.read_text())["meta"]
            found.append((path.stat().st_mtime_ns, meta))
        except (FileNotFoundError, ValueError):
            continue  # it is being written, or has served
    return [meta for _, meta in sorted(found, key=lambda pair: pair[0]) if meta.get("task") == task]


def digests(world, graph):
    return [world.store.manifest(graph.key(f"trained[{block}]")).files[TENSORS].sha256 for block in (0, 1)]


def losses(world, graph):
    return [
        [each["train_loss"] for each in load_artifact(world.store, graph.key(f"trained[{block}]")).record["epochs"]]
        for block in (0, 1)
    ]


def titled(title):
    """Return the processes of this test run whose title begins so."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class Killer(threading.Thread):
    """Kills a process of this title as soon as the store holds a checkpoint of a late enough epoch."""

    def __init__(self, world, title, epoch=3):
        super().__init__(daemon=True)
        self.world, self.title, self.epoch = world, title, epoch
        self.killed = None

    def run(self):
        end = time.monotonic() + 300
        while self.killed is None and time.monotonic() < end:
            if any(meta["epoch"] >= self.epoch for meta in manifests(self.world, "checkpoint")):
                victims = titled(self.title)
                if victims:
                    self.killed = victims[0]
                    os.kill(self.killed, signal.SIGKILL)
            time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(finished, tmp_path_factory):
    """The digests and losses of the trained blocks of a run that nothing disturbs."""
    world = type(finished)(tmp_path_factory.mktemp("undisturbed"))
    shutil.copytree(finished.model, world.model)
    shutil.copytree(finished.store_path, world.store_path)
    graph, _, _ = run_inline(world.recipe(*CHANGE), world.store)
    return digests(world, graph), losses(world, graph)


def steps(events):
    return [event.step for event in events if event.kind == "progress"]


def test_a_killed_worker_goes_on_from_the_last_checkpoint(done, ray_session, undisturbed):
    graph, events = done.graph(*CHANGE), []
    killer = Killer(done, "ray::train[0]")
    killer.start()
    assert execute(graph, targets(graph), done.store, ray_session, on_event=events.append).ok
    assert killer.killed is not None
    assert (digests(done, graph), losses(done, graph)) == undisturbed
    assert manifests(done, "checkpoint") == []  # they have served
    # Of the first block, no epoch but perhaps the one under way was run twice.
    first = [step for step in steps(events) if step <= EPOCHS]
    assert set(first) <= set(range(1, EPOCHS + 1))
    assert len(first) <= EPOCHS + 1


def test_a_killed_driver_leaves_trained_blocks_that_are_not_trained_again(done, undisturbed):
    graph = done.graph(*CHANGE)
    command = [Path(sys.executable).with_name("prefixquant"), "run", done.recipe_file(*CHANGE)]
    driver = subprocess.Popen(
        [*map(str, command), "--store", str(done.store_path), "--cpus", "1", "--tracking", "off", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 300
        while not manifests(done, "trained"):
            assert time.monotonic() < end
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.002)
        under_way = not done.store.has(graph.key("trained[1]"))
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert under_way
    kept = done.store.manifest(graph.key("trained[0]"))
    summary = done.run(*CHANGE)
    # Training, export, report; the killed driver's worker lives on for a moment and can finish the second block itself.
    assert summary.tasks_run in (2, 3)
    assert done.store.manifest(graph.key("trained[0]")) == kept
    assert (digests(done, graph), losses(done, graph)) == undisturbed


@pytest.mark.parametrize("sharding", ["rows", "zero"])
def test_two_ranks_train_as_one_does_even_if_one_of_them_dies(done, ray_session, undisturbed, sharding):
    graph = done.graph(*CHANGE, f"train.sharding={sharding}")
    killer = Killer(done, "ray::_Rank.run")
    killer.start()
    result = execute(graph, targets(graph), done.store, ray_session, ranks=2)
    assert result.ok, result.failures[0].detail
    assert killer.killed is not None
    got, wanted = losses(done, graph), undisturbed[1]
    # Sums in another order change the last bits, past the epoch at which a rank died as well ...
    assert got[0][:5] == pytest.approx(wanted[0][:5], rel=1e-5)  # two ranks' sums take a code across in the sixth
    # ... until they take one value across the edge between two codes, from where on the runs are merely alike.
    for mine, other in zip(got, wanted, strict=True):
        assert mine == pytest.approx(other, rel=0.1)  # 6 % once, in the block that trains on what then differs


def test_ranks_that_cannot_share_a_batch_are_refused(done):
    options = RunOptions(store=str(done.store_path), tracking="off", ranks=3)
    with pytest.raises(ConfigError, match=r"--ranks 3 cannot share train\.batch_size 2"):
        run_recipe(done.recipe(*CHANGE), options)
    with pytest.raises(ConfigError, match="the recipe has none"):
        run_recipe(done.recipe(), options)
