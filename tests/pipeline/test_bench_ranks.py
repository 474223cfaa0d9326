import os
import subprocess
import sys

import pytest

from prefixquant.pipeline.bench_ranks import Timing, agrees, line, main, union_length


def timing(seconds=1.0, loss=2.0, norm=0.5):
    return Timing(seconds=seconds, losses=(loss, loss), norms=(norm,), memory_bytes=0)


def test_the_length_of_a_union_counts_what_overlaps_once():
    assert union_length([]) == 0
    assert union_length([(4.0, 6.0), (0.0, 3.0), (1.0, 2.0), (2.5, 4.5)]) == 6.0
    assert union_length([(0.0, 1.0), (5.0, 7.0)]) == 3.0


def test_other_losses_or_norms_get_no_speed_up():
    assert agrees(timing(loss=2.01), timing())
    assert not agrees(timing(loss=2.03), timing())
    assert not agrees(timing(norm=0.6), timing())
    assert not agrees(timing(loss=float("nan")), timing())
    assert "2.00x" in line("sharded", timing(seconds=0.5), timing())
    wrong = line("sharded", timing(seconds=0.5, loss=3.0), timing())
    assert "WRONG" in wrong
    assert "2.00x" not in wrong


def test_two_ranks_are_measured_against_one():
    options = "--shape smollm2-135m --ranks 2 --batch-sizes 2 --length 8 --steps 1 --precision fp32 --ways sharded ddp"
    done = subprocess.run(
        [sys.executable, "-m", "prefixquant.pipeline.bench_ranks", *options.split()],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    rows = [each.split() for each in done.stdout.splitlines() if "collectives" in each]
    assert [row[1] for row in rows] == ["single", "single-share", "sharded", "ddp"]
    assert "WRONG" not in done.stdout


def test_a_batch_that_the_ranks_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_ranks", "--ranks", "3", "--batch-sizes", "4"])
    with pytest.raises(SystemExit):
        main()
    assert "3 ranks cannot share a batch of 4" in capsys.readouterr().err
