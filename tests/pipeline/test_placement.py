"""What nodes ask for, in which order they go, and how many at once; then all of it on a real Ray with made-up GPUs."""

import json
import subprocess
import sys

import pytest

from prefixquant.pipeline.graph import Estimate, Graph, Node, Resources, Task
from prefixquant.pipeline.placement import Admission, Request, gpu_share, ranks_for, request_of, upward_ranks

GB = 10**9
COMPUTE = Resources(gpus=1, cpus=1)
WORK = Task(name="work", version=1, run=lambda context: None)


def node(name="n", device=0, host=GB, resources=COMPUTE, **fields):
    cost = Estimate(seconds=1, host_bytes=host, device_bytes=device, stored_bytes=0, disk_bytes=3 * GB)
    return Node(name=name, task=WORK, resources=resources, estimate=cost, **fields)


def test_a_gpu_is_shared_by_predicted_memory_with_a_margin():
    assert gpu_share(1 * GB, 80 * GB) == 0.125
    assert gpu_share(10 * GB, 80 * GB) == 0.25  # 10 GB, 15 % and the context
    assert gpu_share(33 * GB, 80 * GB) == 0.5
    assert gpu_share(36 * GB, 80 * GB) == 1.0  # two of them would not fit
    assert gpu_share(36 * GB, None) == 1.0
    assert gpu_share(0, 80 * GB) == 1.0


@pytest.mark.parametrize("gigabytes", [0.5, 3, 7, 11, 19, 26, 33])
def test_tasks_that_share_a_gpu_fit_it_even_if_15_percent_larger_than_predicted(gigabytes):
    share = gpu_share(gigabytes * GB, 80 * GB)
    assert int(1 / share) * 1.15 * gigabytes <= 80


def test_a_node_asks_for_what_is_predicted_and_a_cheap_one_for_nothing():
    assert request_of(node(device=GB), 80 * GB) == Request(cpus=1, gpus=0.125, memory_bytes=GB, disk_bytes=3 * GB)
    assert request_of(node(device=GB, resources=Resources(gpus=2, cpus=4)), 80 * GB).gpus == 2
    cheap = request_of(node(resources=Resources(cpus=0)), 80 * GB)
    assert cheap == Request(cpus=0, gpus=0, memory_bytes=0, disk_bytes=0)


def test_ranks_share_the_gpus_of_a_segment_and_divide_the_batch():
    assert [ranks_for(gpus, 1, 4) for gpus in (0, 1, 2, 3, 4, 8, 64)] == [1, 1, 2, 2, 4, 4, 4]
    assert [ranks_for(8, shares, 4) for shares in (1, 2, 4, 8, 16)] == [4, 4, 2, 1, 1]


def test_upward_ranks_are_the_longest_way_to_the_end():
    graph = Graph(
        [node("a"), node("b", inputs={"x": "a"}), node("c", inputs={"x": "a"}), node("d", inputs={"x": ("b", "c")})]
    )
    assert upward_ranks(graph, {"a": 1, "b": 5, "c": 2, "d": 1}) == {"a": 7, "b": 6, "c": 3, "d": 1}


def request(cpus=1, gpus=0.0):
    return Request(cpus=cpus, gpus=gpus, memory_bytes=0, disk_bytes=0)


def test_admission_stops_at_twice_the_cluster_and_counts_kinds_apart():
    admission = Admission(2, 1, streams=10)
    admitted = [admission.admit(f"gpu{i}", request(gpus=1)) for i in range(4)]
    assert admitted == [True, True, False, False]
    assert [admission.admit(f"cpu{i}", request()) for i in range(6)] == [True] * 4 + [False] * 2
    assert all(admission.admit(f"cheap{i}", request(cpus=0)) for i in range(50))
    admission.end("gpu0")
    assert admission.admit("gpu2", request(gpus=1))


def test_streams_that_nobody_has_read_hold_back_the_next_unless_nothing_else_is_under_way():
    admission = Admission(4, 0, streams=2)
    assert admission.admit("first", request(), waiting_streams=5)
    assert not admission.admit("second", request(), waiting_streams=2)
    assert admission.admit("third", request(), waiting_streams=1)
    admission.end("first")
    admission.end("third")
    assert admission.admit("second", request(), waiting_streams=2)


SCRIPT = """
import json, sys, time
from pathlib import Path
import ray
from prefixquant.cluster.ray_session import assigned_gpus, connect
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.graph import Estimate, Graph, Node, Resources, Task
from prefixquant.pipeline.runner import execute
from prefixquant.pipeline.worker import TaskOutput
from prefixquant.tasks.artifact import Artifact

folder = Path(sys.argv[1])
GB = 10**9

def await_files(names, seconds=240):
    deadline = time.monotonic() + seconds
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, names
        time.sleep(0.05)

def meet(context):  # ends only if all four are running at the same time
    (folder / context.config).write_text(json.dumps(assigned_gpus()))
    await_files(["meet0", "meet1", "meet2", "meet3", "cheap"])
    return TaskOutput(Artifact())

def cheap(context):
    (folder / "cheap").write_text("")
    return TaskOutput(Artifact())

def quick(context):
    return TaskOutput(Artifact())

def cost(device):
    return Estimate(seconds=1, host_bytes=10**6, device_bytes=device, stored_bytes=0)

COMPUTE = Resources(gpus=1, cpus=1)
small = [
    Node(name=f"meet{i}", task=Task(name="meet", version=1, run=meet), config=f"meet{i}", resources=COMPUTE,
         estimate=cost(30 * GB)) for i in range(4)
]
# Submitted last by rank, with every core and GPU taken by the four, it must run all the same: they wait for it.
last = Node(name="cheap", task=Task(name="cheap", version=1, run=cheap), resources=Resources(cpus=0),
            estimate=Estimate(seconds=0.1, host_bytes=10**6, device_bytes=0, stored_bytes=0))
many = [
    Node(name=f"many{i}", task=Task(name="many", version=1, run=quick), config=i, resources=COMPUTE,
         estimate=cost(70 * GB)) for i in range(12)
]
stores, out = ArtifactStore(str(folder / "store")), {}
with connect(num_cpus=4, num_gpus=2, object_store_bytes=100 * 2**20, gpu_bytes=80 * GB) as session:
    result = execute(Graph([*small, last]), [n.name for n in (*small, last)], stores, session)
    out["states"] = sorted(set(result.states.values()))
    out["gpus"] = [json.loads((folder / f"meet{i}").read_text()) for i in range(4)]
    under_way, most = set(), 0
    def watch(event):
        global most
        if event.kind == "submitted":
            under_way.add(event.node)
        elif event.kind == "done":
            under_way.discard(event.node)
        most = max(most, len(under_way))
    result = execute(Graph(many), [n.name for n in many], stores, session, on_event=watch)
    out["many"] = [sorted(set(result.states.values())), most]
    total, free = ray.cluster_resources(), ray.available_resources()
    out["object_store_used"] = total["object_store_memory"] - free["object_store_memory"]
print(json.dumps(out))
"""


def test_small_tasks_share_gpus_a_cheap_one_waits_for_nothing_and_the_queue_is_bounded(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["states"] == ["done"]
    assert sorted(found["gpus"]) == [["0"], ["0"], ["1"], ["1"]]
    states, most = found["many"]
    assert states == ["done"]
    assert most <= 2 * 2  # twice the GPUs
    assert found["object_store_used"] < 2**20  # artifacts travel by key
