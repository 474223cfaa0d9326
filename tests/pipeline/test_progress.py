import io
import sys

import pytest

from prefixquant.pipeline import progress
from prefixquant.pipeline.graph import Estimate, Graph, Node, Task
from prefixquant.pipeline.outcome import Event
from prefixquant.pipeline.plan import Plan, PlanEntry
from prefixquant.pipeline.progress import PlainProgress, QuietProgress, RichProgress, make_progress
from prefixquant.pipeline.worker import NodeResult


def never(context):
    raise AssertionError("progress runs nothing")


ROTATE, BLOCK = (Task(name=name, version=1, run=never) for name in ("rotate", "block"))


def plan():
    """Return a plan of three rotations, one of them cached, and two blocks of 30 seconds."""
    cost = Estimate(seconds=30, host_bytes=0, device_bytes=0, stored_bytes=0)
    nodes = [Node(name=f"rotate[{b}]", task=ROTATE) for b in range(3)]
    nodes += [Node(name=f"block[{b}]", task=BLOCK, estimate=cost) for b in range(2)]
    graph = Graph(nodes)
    states = ["cached", "run", "run", "run", "run"]
    return Plan(tuple(PlanEntry(n, graph.key(n.name), s, "") for n, s in zip(nodes, states, strict=True)))


def done(node, at, seconds=1.0):
    return Event("done", node, node.partition("[")[0], at, NodeResult(seconds, 0, 0, 0, {}))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("quiet", "stream", "kind"),
    [(True, Terminal, QuietProgress), (False, Terminal, RichProgress), (False, io.StringIO, PlainProgress)],
    ids=["quiet", "terminal", "file"],
)
def test_the_stream_decides_the_kind(quiet, stream, kind):
    assert type(make_progress(quiet, plan(), stream())) is kind


def test_stdout_stays_clean(capsys):
    with make_progress(False, plan()) as show:
        show(done("rotate[1]", 1.0))
    out, err = capsys.readouterr()
    assert out == ""
    assert "rotate[1]" in err


def test_plain_lines_count_the_stage_and_estimate_the_rest(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.0)
    stream = io.StringIO()
    with PlainProgress(plan(), stream) as show:
        show(Event("cached", "rotate[0]", "rotate", 0.0))
        show(done("rotate[1]", 10.0, 9.5))
        show(done("rotate[2]", 20.0))
        show(done("block[0]", 65.0, 45.0))
        show(done("block[1]", 90.0))
    assert (
        stream.getvalue().splitlines()
        == [  # 120 s estimated, 12 of them count as done on time: 90 * (10 + 12) / (30 + 12)
            "[10 s] rotate 1/2: rotate[1] done, 9.5 s, about 47 s left",
            "[20 s] rotate 2/2: rotate[2] done, 1.0 s, about 27 s left",
            "[1 min 05 s] block 1/2: block[0] done, 45.0 s, about 23 s left",
            "[1 min 30 s] block 2/2: block[1] done, 1.0 s",
        ]
    )


def test_plain_lines_come_at_most_once_a_second_but_none_of_the_last_is_lost(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 1000.0)
    stream = io.StringIO()
    with PlainProgress(plan(), stream) as show:
        for node in ("rotate[1]", "rotate[2]", "block[0]", "block[1]"):
            show(done(node, 1.0))
    shown = [line.split(": ")[1].split(" done")[0] for line in stream.getvalue().splitlines()]
    assert shown == ["rotate[1]", "rotate[2]", "block[1]"]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal], ids=["file", "terminal"])
@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "loud"])
def test_failures_are_always_shown(quiet, stream):
    out = stream()
    with make_progress(quiet, plan(), out) as show:
        show(Event("failed", "block[0]", "block", 3.0, message="NumericalError: NaN in [down_proj]"))
    assert "block[0] failed: NumericalError: NaN in [down_proj]" in " ".join(out.getvalue().split())


def test_bars_count_each_stage_and_grow_for_a_repair():
    out = Terminal()
    with make_progress(False, plan(), out) as show:
        for node in ("rotate[1]", "rotate[2]", "rotate[0]"):
            show(Event("submitted", node, "rotate", 0.0))
            show(done(node, 1.0))
    assert "3/3" in out.getvalue()
    assert "0/2" in out.getvalue()


def test_default_stream_is_stderr():
    assert make_progress(True, plan()).stream is sys.stderr
