import sys

import pytest

from prefixquant.tasks import bench_training
from prefixquant.tasks.bench_training import Distance
from prefixquant.tasks.model.ways import StepWays


def run(monkeypatch, *more):
    options = "--shape smollm2-135m --batch-size 1 --length 16 --steps 1"
    monkeypatch.setattr(sys, "argv", ["bench_training", *options.split(), *more])
    bench_training.main()


def test_variants_are_timed_and_checked_beside_the_default(monkeypatch, capsys):
    run(monkeypatch, "--variants", "cudnn")
    printed = capsys.readouterr().out
    assert [each.split()[0] for each in printed.splitlines() if "ms a step" in each] == ["default", "cudnn"]
    assert printed.count("right; from float32: loss") == 2


def test_a_variant_that_takes_another_step_fails_the_bench(monkeypatch, capsys):
    original = bench_training.build

    def build(*args):
        block, prefix, groups = original(*args)
        take_ways = block.take_ways

        def take_wrong_ways(ways):
            take_ways(ways)
            block.attention.rotate_queries = ways == StepWays()

        block.take_ways = take_wrong_ways
        return block, prefix, groups

    monkeypatch.setattr(bench_training, "build", build)
    with pytest.raises(SystemExit, match="not the same step: padded"):
        run(monkeypatch, "--variants", "padded")
    assert "WRONG; from float32" in capsys.readouterr().out


def test_a_way_may_be_as_far_from_float32_as_the_default_and_no_further():
    default = Distance(0.001, {"q_proj.weight": 0.2, "o_proj.weight": 0.01}, 0.3)
    assert Distance(0.002, {"q_proj.weight": 0.26, "o_proj.weight": 0.03}, 0.9).agrees(default)
    assert not Distance(0.002, {"q_proj.weight": 0.2, "o_proj.weight": 0.04}, 0.3).agrees(default)
    assert not Distance(0.03, default.weights, 0.3).agrees(default)
    assert not Distance(float("nan"), default.weights, 0.3).agrees(default)
