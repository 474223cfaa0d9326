"""Graphs of toy arithmetic on a real local Ray and a real store."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from processes import alive, descendants
from ray import cloudpickle
from waiting import wait_until

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact
from prefixquant.pipeline.graph import Graph, Node, Resources, Task
from prefixquant.pipeline.runner import execute
from prefixquant.pipeline.worker import TaskOutput
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.errors import NumericalError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@dataclass(frozen=True)
class Toy:
    folder: str
    """Where tasks leave traces of their runs."""

    label: str = ""
    value: int = 0


def trace(config):
    with open(Path(config.folder, "runs"), "a") as runs:
        runs.write(f"{config.label}\n")


def value_of(artifact):
    return int(artifact.tensors["x"])


def number(x, **metrics):
    return TaskOutput(Artifact({"x": torch.tensor(x)}, {"sum": x}), metrics=metrics)


def run_sum(context):
    """Return the sum of the inputs, single or several, plus the config's value."""
    trace(context.config)
    total = context.config.value
    for given in context.inputs.values():
        total += value_of(given) if isinstance(given, Artifact) else sum(value_of(each) for each in given)
    return number(total, total=total)


def run_fragile(context):
    if not Path(context.config.folder, "mended").exists():
        raise NumericalError(f"{context.config.label}: NaN in site down_proj")
    return run_sum(context)


def run_killed_once(context):
    marker = Path(context.config.folder, "killed")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run_sum(context)


def run_block(context):
    """Return twice the stream and, where asked for, the next stream: the stream plus that."""
    trace(context.config)
    stream = value_of(context.inputs["stream"])
    products = {"next": number(stream + 2 * stream).artifact} if "next" in context.byproducts else {}
    return replace(number(2 * stream), byproducts=products)


def run_forgetful(context):
    return number(0)


def run_look_around(context):
    return number(0, threads=torch.get_num_threads(), on_gpu=context.device.type == "cuda")


SUM = Task(name="sum", version=1, run=run_sum)
FRAGILE = Task(name="fragile", version=1, run=run_fragile)
BLOCK = Task(name="block", version=1, run=run_block)
STREAM = Task(name="stream", version=1, run=run_sum, ephemeral=True)


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def runs(tmp_path):
    """Return a function that gives the labels of the tasks run since it was last called, sorted."""
    path = tmp_path / "runs"

    def take():
        labels = sorted(path.read_text().split()) if path.exists() else []
        path.unlink(missing_ok=True)
        return labels

    return take


def node(folder, name, task=SUM, value=0, byproducts=None, **inputs):
    config = Toy(str(folder), name, value)
    return Node(name=name, task=task, config=config, inputs=inputs, byproducts=byproducts or {})


def diamond(folder, right=SUM, value=1):
    return Graph(
        [
            node(folder, "top", value=value),
            node(folder, "left", value=10, x="top"),
            node(folder, "right", right, value=100, x="top"),
            node(folder, "join", x=("left", "right"), top="top"),
        ]
    )


def chain(folder, blocks=4):
    """Return stream[0] -> block[0] (also gives stream[1]) -> block[1] ...: block[b] holds 2 * 3**b, stream[b] 3**b."""
    nodes = [node(folder, "stream[0]", STREAM, value=1)]
    for b in range(blocks):
        last = b + 1 == blocks
        after = {} if last else {"next": f"stream[{b + 1}]"}
        nodes.append(node(folder, f"block[{b}]", BLOCK, byproducts=after, stream=f"stream[{b}]"))
        if not last:
            nodes.append(node(folder, f"stream[{b + 1}]", STREAM, stream=f"stream[{b}]", block=f"block[{b}]"))
    return Graph(nodes), [f"block[{b}]" for b in range(blocks)]


def value(store, graph, name):
    return value_of(load_artifact(store, graph.key(name)))


def test_a_diamond_is_computed_once_and_a_second_run_runs_nothing(ray_session, store, tmp_path, runs):
    graph, events = diamond(tmp_path), []
    first = execute(graph, ["join"], store, ray_session, on_event=events.append)
    assert first.ok
    assert set(first.states.values()) == {"done"}
    assert value(store, graph, "join") == 113
    assert runs() == ["join", "left", "right", "top"]
    assert [event.node for event in events if event.kind == "done"][::3] == ["top", "join"]
    assert first.results["join"].metrics == {"total": 113.0}
    assert first.results["join"].peak_host_bytes > 2**20
    meta = store.manifest(graph.key("join")).meta
    assert (meta["task"], meta["version"], meta["node"], meta["config"]["label"]) == ("sum", 1, "join", "join")
    assert meta["inputs"] == {"x": [graph.key("left"), graph.key("right")], "top": graph.key("top")}
    assert meta["metrics"] == {"total": 113.0}

    second = execute(graph, ["join"], store, ray_session)
    assert second.states == {"top": "unneeded", "left": "unneeded", "right": "unneeded", "join": "cached"}
    assert second.results == {}
    assert runs() == []


def test_a_changed_config_runs_what_depends_on_it_alone(ray_session, store, tmp_path, runs):
    execute(diamond(tmp_path), ["join"], store, ray_session)
    runs()
    graph = Graph([*(n for n in diamond(tmp_path).nodes.values() if n.name != "left"), node(tmp_path, "left", x="top")])
    result = execute(graph, ["join"], store, ray_session)
    assert result.states == {"top": "cached", "right": "cached", "left": "done", "join": "done"}
    assert runs() == ["join", "left"]


def test_a_task_that_raises_fails_its_branch_and_the_rerun_goes_on_from_there(ray_session, store, tmp_path, runs):
    graph = diamond(tmp_path, right=FRAGILE)
    result = execute(graph, ["join"], store, ray_session)
    assert not result.ok
    assert result.states == {"top": "done", "left": "done", "right": "failed", "join": "skipped"}
    assert store.has(graph.key("left"))
    (failure,) = result.failures
    assert (failure.node, failure.key) == ("right", graph.key("right"))
    assert failure.error == "NumericalError: right: NaN in site down_proj"
    assert "diverged" in failure.advice
    assert "run_fragile" in failure.detail
    assert runs() == ["left", "top"]

    (tmp_path / "mended").touch()
    assert execute(graph, ["join"], store, ray_session).states["join"] == "done"
    assert runs() == ["join", "right"]


def test_streams_go_when_they_have_served_and_come_back_for_a_lost_block(ray_session, store, tmp_path, runs):
    graph, blocks = chain(tmp_path)
    result = execute(graph, blocks, store, ray_session)
    assert set(result.states.values()) == {"done"}
    assert set(store.keys()) == {graph.key(name) for name in blocks}
    assert [value(store, graph, name) for name in blocks] == [2, 6, 18, 54]
    assert runs() == [*blocks, "stream[0]"]  # the other streams came along
    assert result.results.keys() == {*blocks, "stream[0]"}

    store.discard(graph.key("block[2]"))
    again = execute(graph, blocks, store, ray_session)
    assert runs() == ["block[2]", "stream[0]", "stream[1]", "stream[2]"]
    assert value(store, graph, "block[2]") == 18
    assert set(store.keys()) == {graph.key(name) for name in blocks}
    assert again.states["stream[3]"] == "unneeded"  # block[2] was not asked for it
    assert again.states["block[3]"] == "cached"


def test_leftover_streams_of_a_killed_run_are_removed(ray_session, store, tmp_path):
    graph, blocks = chain(tmp_path)
    execute(graph, blocks, store, ray_session)
    store.publish(graph.key("stream[1]"), {"record.json": b"{}"}, meta={})
    events = []
    execute(graph, blocks, store, ray_session, on_event=events.append)
    assert not store.has(graph.key("stream[1]"))
    assert [event.node for event in events if event.kind == "discarded"] == ["stream[1]"]


def test_a_failed_block_keeps_the_stream_in_front_of_it(ray_session, store, tmp_path, runs):
    graph, blocks = chain(tmp_path)
    fragile = replace(graph.nodes["block[2]"], task=FRAGILE)
    graph = Graph([fragile if n.name == "block[2]" else n for n in graph.nodes.values()])
    result = execute(graph, blocks, store, ray_session)
    assert [result.states[name] for name in blocks] == ["done", "done", "failed", "skipped"]
    assert set(store.keys()) == {graph.key(name) for name in ("block[0]", "block[1]", "stream[2]")}


def test_a_corrupted_artifact_is_built_again_and_nothing_else(ray_session, store, tmp_path, runs):
    graph = diamond(tmp_path)
    execute(graph, ["join"], store, ray_session)
    runs()
    store.discard(graph.key("join"))
    path = store.local_path(graph.key("left"), "tensors.safetensors")
    path.write_bytes(bytes(path.stat().st_size))
    events = []
    result = execute(graph, ["join"], store, ray_session, on_event=events.append)
    assert result.ok
    assert value(store, graph, "join") == 113
    assert sorted(set(runs())) == ["join", "left"]
    (repair,) = [event for event in events if event.kind == "repaired"]
    assert repair.node == "join"
    assert graph.key("left") in repair.message


def test_a_corrupted_block_brings_back_the_streams_it_needs(ray_session, store, tmp_path, runs):
    graph, blocks = chain(tmp_path)
    total = node(tmp_path, "total", x=tuple(blocks))
    graph = Graph([*graph.nodes.values(), total])
    execute(graph, ["total"], store, ray_session)
    runs()
    store.discard(graph.key("total"))
    path = store.local_path(graph.key("block[1]"), "record.json")
    path.write_bytes(b"?" * path.stat().st_size)
    assert execute(graph, ["total"], store, ray_session).ok
    assert value(store, graph, "total") == 80
    assert sorted(set(runs())) == ["block[1]", "stream[0]", "stream[1]", "total"]
    assert set(store.keys()) == {graph.key(name) for name in (*blocks, "total")}


def test_an_input_damaged_each_time_ends_in_one_clear_failure(ray_session, store, tmp_path):
    graph = Graph([node(tmp_path, "source"), node(tmp_path, "reader", x="source")])

    def damage(event):
        if event.kind == "done" and event.node == "source":
            path = store.local_path(graph.key("source"), "record.json")
            path.write_bytes(b"?" * path.stat().st_size)

    result = execute(graph, ["reader"], store, ray_session, on_event=damage)
    assert result.states == {"source": "done", "reader": "failed"}
    assert result.failures[0].error.startswith("ArtifactCorrupted: ")
    assert "check the disk" in result.failures[0].advice


def test_a_killed_worker_is_replaced(ray_session, store, tmp_path, runs):
    graph = diamond(tmp_path, right=Task(name="killed", version=1, run=run_killed_once))
    assert execute(graph, ["join"], store, ray_session).ok
    assert value(store, graph, "join") == 113
    assert runs() == ["join", "left", "right", "top"]


def test_equal_work_under_two_names_runs_once(ray_session, store, tmp_path, runs):
    config = Toy(str(tmp_path), "same", 5)
    twins = [Node(name=name, task=SUM, config=config) for name in ("a", "b")]
    graph = Graph([*twins, node(tmp_path, "sum", x=("a", "b"))])
    result = execute(graph, ["sum"], store, ray_session)
    assert result.states == {"a": "done", "b": "cached", "sum": "done"}
    assert value(store, graph, "sum") == 10
    assert runs() == ["same", "sum"]


def test_a_task_that_does_not_yield_what_it_declares_fails(ray_session, store, tmp_path):
    forgetful = Task(name="forgetful", version=1, run=run_forgetful)
    graph = Graph([node(tmp_path, "a", forgetful, byproducts={"more": "b"}), node(tmp_path, "b", x="a")])
    result = execute(graph, ["b"], store, ray_session)
    assert result.states == {"a": "failed", "b": "skipped"}
    assert "did not yield ['more']" in result.failures[0].error


def test_without_gpus_a_task_that_wants_some_runs_on_cpu_with_its_threads(ray_session, store, tmp_path):
    look = Node(
        name="look",
        task=Task(name="look", version=1, run=run_look_around),
        config=Toy(str(tmp_path)),
        resources=Resources(gpus=1, cpus=64),
    )
    result = execute(Graph([look]), ["look"], store, ray_session)
    assert result.results["look"].metrics == {"threads": 2.0, "on_gpu": 0.0}
    assert result.results["look"].peak_device_bytes == 0


SCRIPT = """
import json, sys, time
from pathlib import Path
from prefixquant.cluster.ray_session import connect
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.graph import Graph, Node, Task
from prefixquant.pipeline.runner import execute
from prefixquant.pipeline.worker import TaskOutput
from prefixquant.tasks.artifact import Artifact

folder = Path(sys.argv[1])

def quick(context):
    return TaskOutput(Artifact(record={"ok": 1}))

def slow(context):
    (folder / "started").touch()
    time.sleep(300)
    return quick(context)

graph = Graph([
    Node(name="first", task=Task(name="quick", version=1, run=quick)),
    Node(name="slow", task=Task(name="slow", version=1, run=slow), inputs={"x": "first"}),
    Node(name="last", task=Task(name="last", version=1, run=quick), inputs={"x": "slow"}),
])
with connect(num_cpus=1, num_gpus=0, object_store_bytes=100 * 2**20) as session:
    result = execute(graph, ["last"], ArtifactStore(str(folder / "store")), session)
print(json.dumps({"states": result.states, "interrupted": result.interrupted}))
"""


def start(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_an_interrupted_run_ends_at_once_leaves_no_process_and_keeps_what_is_done(tmp_path):
    # Ctrl-C in a terminal reaches the whole process group, a SIGTERM from a scheduler the driver alone.
    interrupts = {"done": lambda p: os.killpg(p.pid, signal.SIGINT), "cached": lambda p: p.send_signal(signal.SIGTERM)}
    for first, interrupt in interrupts.items():
        (tmp_path / "started").unlink(missing_ok=True)
        with start(tmp_path) as driver:
            deadline = time.monotonic() + 240
            while not (tmp_path / "started").exists():
                assert time.monotonic() < deadline
                assert driver.poll() is None
                time.sleep(0.05)
            family = descendants(driver.pid)
            assert family
            interrupt(driver)
            report = json.loads(driver.communicate(timeout=120)[0].splitlines()[-1])
        assert report == {"states": {"first": first, "slow": "skipped", "last": "skipped"}, "interrupted": True}
        wait_until(lambda family=family: not any(alive(pid) for pid in family))
