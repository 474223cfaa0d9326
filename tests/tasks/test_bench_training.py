import sys

import pytest

from prefixquant.tasks import bench_training
from prefixquant.tasks.bench_training import Distance


def run(monkeypatch, *more):
    options = "--shape smollm2-135m --batch-size 1 --length 16 --steps 1"
    monkeypatch.setattr(sys, "argv", ["bench_training", *options.split(), *more])
    bench_training.main()


def test_variants_are_timed_and_checked_beside_the_default(monkeypatch, capsys):
    run(monkeypatch, "--variants", "older")
    printed = capsys.readouterr().out
    assert [each.split()[0] for each in printed.splitlines() if "ms a step" in each] == ["default", "older"]
    assert printed.count("right; from float32: loss") == 2
    assert printed.count("older, not compiled; from float32: loss") == 1


@pytest.mark.parametrize("wrong", ["default", "lower-right"])
def test_a_variant_that_takes_another_step_fails_the_bench(monkeypatch, capsys, wrong):
    original = bench_training.build

    def build(*args):
        block, prefix, groups = original(*args)
        take_ways = block.take_ways

        def take_wrong_ways(ways):
            take_ways(ways)
            block.attention.rotate_queries = ways != bench_training.VARIANTS[wrong]

        block.take_ways = take_wrong_ways
        return block, prefix, groups

    monkeypatch.setattr(bench_training, "build", build)
    with pytest.raises(SystemExit, match=f"not the same step: {wrong}$"):
        run(monkeypatch, "--variants", "lower-right")
    assert "WRONG; from float32" in capsys.readouterr().out


def test_a_way_may_be_as_far_from_float32_as_the_older_ways_and_no_further():
    older = Distance(0.001, {"q_proj.weight": 0.2, "o_proj.weight": 0.01}, 0.3)
    assert Distance(0.002, {"q_proj.weight": 0.26, "o_proj.weight": 0.03}, 0.9).agrees(older)
    assert not Distance(0.002, {"q_proj.weight": 0.2, "o_proj.weight": 0.04}, 0.3).agrees(older)
    assert not Distance(0.03, older.weights, 0.3).agrees(older)
    assert not Distance(float("nan"), older.weights, 0.3).agrees(older)
