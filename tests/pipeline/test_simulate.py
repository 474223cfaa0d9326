"""Schedules of small graphs whose length is known."""

from prefixquant.pipeline.graph import Graph, Node, Task
from prefixquant.pipeline.simulate import simulate


def never(context):
    raise AssertionError("simulating runs nothing")


WORK = Task(name="work", version=1, run=never)
STREAM = Task(name="stream", version=1, run=never)
TRAIN = Task(name="train", version=1, run=never)
TRAINED = Task(name="trained", version=1, run=None)


def graph_of(**parents):
    return Graph([Node(name=name, task=WORK, inputs={"x": tuple(given)}) for name, given in parents.items()])


def test_independent_tasks_share_the_slots():
    graph = graph_of(a=(), b=(), c=(), d=())
    seconds = dict.fromkeys("abcd", 10.0)
    for slots, wanted in ((1, 40.0), (2, 20.0), (3, 20.0), (4, 10.0), (9, 10.0)):
        found = simulate(graph, seconds, slots, {})
        assert (found.seconds, found.critical_seconds, found.slot_seconds) == (wanted, 10.0, 40.0)
    assert simulate(graph, seconds, 2, {}).busy == 1.0


def test_a_chain_gains_nothing_from_slots():
    found = simulate(graph_of(a=(), b="a", c="b"), {"a": 1.0, "b": 2.0, "c": 3.0}, 8, {})
    assert found.seconds == found.critical_seconds == 6.0
    assert found.start == {"a": 0.0, "b": 1.0, "c": 3.0}
    assert found.critical == {"work": 6.0}


def test_what_most_waits_for_goes_first():
    # Two slots: `long` must start at once, or the end is at 13 instead of 10.
    graph = graph_of(short1=(), short2=(), short3=(), long=())
    found = simulate(graph, {"short1": 3.0, "short2": 3.0, "short3": 3.0, "long": 10.0}, 2, {})
    assert found.start["long"] == 0.0
    assert found.seconds == 10.0


def test_a_wide_task_waits_for_its_slots_and_a_free_one_for_none():
    graph = graph_of(a=(), wide=(), cheap=())
    found = simulate(graph, {"a": 4.0, "wide": 3.0, "cheap": 1.0}, 2, {"wide": 2, "cheap": 0})
    assert found.start["cheap"] == 0.0
    assert (found.start["a"], found.start["wide"]) == (0.0, 4.0)
    assert found.slot_seconds == 4.0 + 2 * 3.0


def test_done_tasks_take_nothing_and_byproducts_come_with_their_yielder():
    graph = Graph(
        [
            Node(name="stream", task=STREAM),
            Node(name="train", task=TRAIN, inputs={"x": "stream"}, byproducts={"0": "trained"}),
            Node(name="trained", task=TRAINED),
            Node(name="export", task=WORK, inputs={"x": "trained"}),
        ]
    )
    found = simulate(graph, {"train": 5.0, "export": 1.0}, 1, {})
    assert found.seconds == found.critical_seconds == 6.0
    assert found.critical == {"train": 5.0, "work": 1.0, "stream": 0.0, "trained": 0.0}
