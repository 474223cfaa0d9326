"""Run a function's shares in processes of this machine, each on its own devices."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def devices_of(shard: int, gpus: int, device: str) -> list[torch.device]:
    """Return where a share runs: `cuda` stands for the next `gpus` GPUs in turn, any other device for itself."""
    if device != "cuda":
        return [torch.device(device)]
    return [torch.device("cuda", (shard * gpus + each) % torch.cuda.device_count()) for each in range(gpus)]


def run_shards(function: Callable[..., T], *args: Any, shards: int, gpus: int = 1, device: str = "cpu") -> list[T]:
    """Return `function(shard, shards, devices, *args)` of each shard, in order.

    A single shard runs in this process. Several run in fresh ones, which share the cores, so the function and its
    arguments must be picklable. What one raises is raised here once all have ended.
    """
    if shards == 1:
        return [function(0, 1, devices_of(0, gpus, device), *args)]
    threads = max(1, (os.cpu_count() or 1) // shards)
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(shards, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        places: Sequence[list[torch.device]] = [devices_of(shard, gpus, device) for shard in range(shards)]
        running = [pool.submit(function, shard, shards, places[shard], *args) for shard in range(shards)]
        return [each.result() for each in running]
