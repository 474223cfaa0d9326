import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from prefixquant.pipeline.graph import Graph, GraphError, Node, Task


def never(context):
    raise AssertionError("a graph is only looked at here")


STEP = Task(name="step", version=1, run=never)


@dataclass(frozen=True)
class Config:
    value: int = 1


def node(name, *inputs, config=None, task=STEP, **byproducts):
    return Node(
        name=name, task=task, config=config, inputs={f"x{i}": p for i, p in enumerate(inputs)}, byproducts=byproducts
    )


def test_order_keeps_the_declaration_where_it_can():
    graph = Graph([node("a"), node("c", "b"), node("b", "a"), node("d"), node("e", ("c", "d"), "a")])
    graph.check()
    assert graph.order == ("a", "b", "c", "d", "e")
    assert graph.parents("e") == ("c", "d", "a")
    assert graph.consumers("a") == ("b", "e")


def test_a_byproduct_comes_after_the_node_that_yields_it():
    graph = Graph([node("stream"), node("next", "stream"), node("block", "stream", out="next")])
    assert graph.order == ("stream", "block", "next")
    assert graph.yielder("next") == "block"
    assert graph.yielder("block") is None


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("a", "c"), node("b", "a"), node("c", "b")], "cycle: .*a.*b.*c"),
        ([node("a", "a")], "cycle: a -> a"),
        ([node("a", "ghost")], "'a' refers to 'ghost'"),
        ([node("a", out="ghost")], "'a' refers to 'ghost'"),
        ([node("a"), node("a")], "two nodes are named 'a'"),
        ([node("a", out="c"), node("b", out="c"), node("c")], "both 'a' and 'b' yield 'c'"),
        ([node("a", out="b"), node("b", out="c"), node("c")], "'b' is a byproduct of 'a'"),
        ([node("a", "b", out="b"), node("b")], "cycle"),
    ],
    ids=["cycle", "self", "input", "byproduct", "twin", "two-yielders", "byproduct-chain", "yields-its-input"],
)
def test_check_refuses_and_names_the_nodes(nodes, message):
    with pytest.raises(GraphError, match=message):
        Graph(nodes).check()


def test_a_long_chain_is_no_problem():
    graph = Graph([node("n0"), *(node(f"n{i}", f"n{i - 1}") for i in range(1, 3000))][::-1])
    assert graph.order[-1] == "n2999"
    assert len({graph.key(name) for name in graph.order}) == 3000


def test_key_follows_task_version_config_and_inputs_but_not_the_name():
    def keys(first, second="b"):
        graph = Graph([first, node(second, first.name)])
        return graph.key(first.name), graph.key(second)

    base = keys(node("a", config=Config()))
    assert keys(node("renamed", config=Config()), second="too") == base
    assert keys(replace(node("a", config=Config()), estimate=None, byproducts={})) == base
    for changed in (
        node("a", config=Config(2)),
        node("a", config=Config(), task=replace(STEP, version=2)),
        node("a", config=Config(), task=replace(STEP, name="other")),
    ):
        first, second = keys(changed)
        assert first != base[0]
        assert second != base[1]  # it passes on to what depends on it


def test_equal_work_under_two_names_has_one_key():
    graph = Graph([node("a", config=Config()), node("b", config=Config()), node("c", ("a", "b"))])
    assert graph.names_of(graph.key("a")) == ("a", "b")
    assert graph.input_keys("c") == {"x0": (graph.key("a"), graph.key("b"))}


def test_merging_parts_has_the_key_of_the_whole_and_runs_on_the_parts():
    whole = Graph([node("source"), node("end", "source")])
    for count in (2, 5):
        parts = [node(f"part{i}", "source", config=Config(i)) for i in range(count)]
        merged = replace(node("end", tuple(part.name for part in parts)), key_inputs={"x0": "source"})
        graph = Graph([merged, node("source"), *parts])
        assert graph.key("end") == whole.key("end")
        assert graph.parents("end") == tuple(part.name for part in parts)
        assert graph.input_keys("end") == {"x0": tuple(graph.key(part.name) for part in parts)}
        assert graph.order[-1] == "end"
        assert "end" not in graph.consumers("source")


def test_what_a_key_is_made_of_must_be_in_the_graph():
    with pytest.raises(GraphError, match="'a' refers to 'ghost'"):
        Graph([replace(node("a"), key_inputs={"x0": "ghost"})]).check()


def test_looking_at_a_graph_imports_neither_torch_nor_ray():
    code = "import sys, prefixquant.pipeline.plan; sys.exit(bool({'torch', 'ray', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
