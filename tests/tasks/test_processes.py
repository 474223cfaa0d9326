"""Shares of a function in processes of their own."""

import os

import pytest
import torch

from prefixquant.tasks.errors import NumericalError
from prefixquant.tasks.processes import devices_of, run_shards


def describe(shard: int, shards: int, devices: list[torch.device], word: str) -> tuple[int, int, str, str, int, int]:
    return shard, shards, str(devices[0]), word, os.getpid(), torch.get_num_threads()


def fail_in_second(shard: int, shards: int, devices: list[torch.device]) -> int:
    if shard == 1:
        raise NumericalError("block 3: the output holds NaN")
    return shard


def test_a_single_share_runs_here():
    ((*found, pid, _),) = run_shards(describe, "x", shards=1)
    assert found == [0, 1, "cpu", "x"]
    assert pid == os.getpid()


def test_several_shares_run_in_processes_of_their_own_which_share_the_cores():
    found = run_shards(describe, "x", shards=2)
    assert [each[:4] for each in found] == [(0, 2, "cpu", "x"), (1, 2, "cpu", "x")]
    assert len({os.getpid(), *(each[4] for each in found)}) > 1
    assert {each[5] for each in found} == {max(1, (os.cpu_count() or 1) // 2)}


def test_what_a_share_raises_is_raised():
    with pytest.raises(NumericalError, match="block 3"):
        run_shards(fail_in_second, shards=2)


def test_shares_take_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(d) for d in devices_of(1, 2, "cuda")] == ["cuda:2", "cuda:3"]
    assert [str(d) for d in devices_of(5, 1, "cuda")] == ["cuda:1"]
    assert [str(d) for d in devices_of(5, 1, "cuda:3")] == ["cuda:3"]
