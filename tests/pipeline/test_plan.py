from dataclasses import dataclass, replace

import pytest

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.graph import Estimate, Graph, GraphError, Node, Task
from prefixquant.pipeline.keys import plain_config
from prefixquant.pipeline.plan import decide, make_plan


def never(context):
    raise AssertionError("planning runs nothing")


@dataclass(frozen=True)
class PrefixConfig:
    outlier_ratio: int = 64
    max_tokens: int = 8


PREFIX = Task(name="prefix", version=1, run=never)
BLOCK = Task(name="block", version=1, run=never)
STREAM = Task(name="stream", version=1, run=never, ephemeral=True)
EXPORT = Task(name="export", version=1, run=never)


def chain(blocks=3, prefix_config=PrefixConfig(), prefix_task=PREFIX):
    """Return prefix -> stream[0] -> block[0] (also gives stream[1]) -> block[1] ... -> export."""
    nodes = [Node(name="prefix", task=prefix_task, config=prefix_config)]
    for b in range(blocks):
        inputs = {"prefix": "prefix"} if b == 0 else {"stream": f"stream[{b - 1}]", "block": f"block[{b - 1}]"}
        nodes.append(Node(name=f"stream[{b}]", task=STREAM, inputs=inputs))
        after = {"next": f"stream[{b + 1}]"} if b + 1 < blocks else {}
        nodes.append(Node(name=f"block[{b}]", task=BLOCK, inputs={"stream": f"stream[{b}]"}, byproducts=after))
    nodes.append(Node(name="export", task=EXPORT, inputs={"blocks": tuple(f"block[{b}]" for b in range(blocks))}))
    graph = Graph(nodes)
    graph.check()
    return graph


def keys(graph, *names):
    return {graph.key(name) for name in names}


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path))


def publish(store, graph, *names):
    for name in names:
        node = graph.nodes[name]
        meta = {"task": node.task.name, "version": node.task.version, "config": plain_config(node.config)}
        store.publish(graph.key(name), {"record.json": b"{}"}, meta=meta)


def reasons(plan):
    return {entry.node.name: entry.reason for entry in plan.entries}


def test_an_empty_store_runs_everything_but_what_comes_along():
    states = decide(chain(), ["export"], set())
    assert [name for name, state in states.items() if state == "run"] == [
        "prefix", "stream[0]", "block[0]", "block[1]", "block[2]", "export",
    ]  # fmt: skip
    assert [name for name, state in states.items() if state == "yielded"] == ["stream[1]", "stream[2]"]


def test_a_stored_target_needs_nothing():
    graph = chain()
    states = decide(graph, ["export"], keys(graph, "export"))
    assert states.pop("export") == "cached"
    assert set(states.values()) == {"unneeded"}


def test_done_blocks_need_no_streams():
    graph = chain()
    states = decide(graph, ["export"], keys(graph, "prefix", "block[0]", "block[1]", "block[2]"))
    assert [states[f"stream[{b}]"] for b in range(3)] == ["unneeded"] * 3
    assert states["prefix"] == "unneeded"
    assert states["export"] == "run"


def test_a_lost_block_rebuilds_the_streams_in_front_of_it_alone():
    graph = chain(4)
    states = decide(graph, ["export"], keys(graph, "prefix", "block[0]", "block[1]", "block[3]"))
    assert {name: state for name, state in states.items() if state == "run"}.keys() == {
        "stream[0]", "stream[1]", "stream[2]", "block[2]", "export",
    }  # fmt: skip
    assert states["stream[3]"] == "unneeded"


def test_a_stored_stream_ends_the_rebuilding():
    graph = chain(4)
    states = decide(graph, ["export"], keys(graph, "block[0]", "block[1]", "stream[2]"))
    assert states["stream[2]"] == "cached"
    assert states["stream[1]"] == states["stream[0]"] == states["prefix"] == "unneeded"


def test_a_byproduct_runs_by_itself_when_the_node_that_yields_it_has_failed():
    nodes = [
        Node(name="x", task=PREFIX),
        Node(name="trained", task=BLOCK, inputs={"x": "x"}, byproducts={"fp": "fp"}),
        Node(name="fp", task=STREAM, inputs={"x": "x"}),
        Node(name="last", task=EXPORT, inputs={"fp": "fp"}),
    ]
    graph = Graph(nodes)
    stored = keys(graph, "x")
    assert decide(graph, ["last", "trained"], stored)["fp"] == "yielded"
    assert decide(graph, ["last", "trained"], stored, failed=["trained"])["fp"] == "run"
    assert decide(graph, ["last"], stored)["fp"] == "run"  # nobody wants `trained`


def test_an_unknown_target_is_refused():
    with pytest.raises(GraphError, match="ghost"):
        decide(chain(), ["ghost"], set())


def test_reasons_of_a_first_run(store):
    plan = make_plan(chain(2), ["export"], store)
    assert reasons(plan) == {
        "prefix": "never built",
        "stream[0]": "needed by block[0]",
        "block[0]": "never built",
        "stream[1]": "comes with block[0]",
        "block[1]": "never built",
        "export": "never built",
    }


def test_reasons_of_a_resumed_run(store):
    graph = chain(3)
    publish(store, graph, "prefix", "block[0]", "block[1]")
    previous = {name: graph.key(name) for name in graph.order}
    assert reasons(make_plan(graph, ["export"], store, previous)) == {
        "prefix": "in the store",
        "stream[0]": "needed by stream[1]",
        "block[0]": "in the store",
        "stream[1]": "needed by stream[2] and no longer stored",
        "block[1]": "in the store",
        "stream[2]": "needed by block[2] and no longer stored",
        "block[2]": "not in the store, unchanged since the last run",
        "export": "not in the store, unchanged since the last run",
    }


def test_reasons_name_what_changed(store):
    old = chain(2)
    publish(store, old, "prefix", "block[0]", "block[1]", "export")
    previous = {name: old.key(name) for name in old.order}

    changed = reasons(make_plan(chain(2, PrefixConfig(outlier_ratio=32)), ["export"], store, previous))
    assert changed["prefix"] == "config changed: outlier_ratio 64 -> 32"
    assert changed["stream[0]"] == "input prefix changed"
    assert changed["export"] == "input block[0] and 1 more changed"

    newer = reasons(make_plan(chain(2, prefix_task=replace(PREFIX, version=2)), ["export"], store, previous))
    assert newer["prefix"] == "task version 1 -> 2"

    store.discard(previous["prefix"])
    assert reasons(make_plan(chain(2, PrefixConfig(max_tokens=4)), ["export"], store, previous))["prefix"] == (
        "settings changed since the last run"
    )


def test_total_adds_seconds_takes_the_largest_memory_and_keeps_durable_bytes(store):
    def cost(seconds, memory):
        return Estimate(seconds=seconds, host_bytes=memory, device_bytes=2 * memory, stored_bytes=7)

    graph = Graph(
        [
            Node(name="stored", task=PREFIX, estimate=cost(100, 100)),
            Node(name="stream", task=STREAM, inputs={"x": "stored"}, estimate=cost(3, 10)),
            Node(name="block", task=BLOCK, inputs={"x": "stream"}, estimate=cost(4, 20)),
            Node(name="export", task=EXPORT, inputs={"x": "block"}),
        ]
    )
    publish(store, graph, "stored")
    plan = make_plan(graph, ["export"], store)
    assert plan.names("run") == ("stream", "block", "export")
    assert plan.total == Estimate(seconds=7, host_bytes=20, device_bytes=40, stored_bytes=7)
