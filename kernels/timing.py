"""Times of work on a GPU."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from prefixquant.kernels.workspace import recording


def record(function: Callable[[], object], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of `repeats` calls, recorded after two calls that load what they need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream=stream):
        for _ in range(repeats):
            function()
    return graph


def median_ms(function: Callable[[], object], rounds: int = 7, warmup: int = 1) -> float:
    """Return the median time of a call in ms, by events on the device, after `warmup` calls that are not counted."""
    times = []
    for _ in range(rounds + warmup):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warmup:])


def steady_us(functions: Sequence[Callable[[], object]], repeats: int = 5, seconds: float = 1.0) -> float:
    """Return the time in us of one of several functions, called in turn so that no cache holds their weights.

    They run back to back in a CUDA graph, so no time of the host is in it, and for `seconds` before anything counts:
    a GPU that is busy lowers its clock to what its power allows, and that depends on the work.
    """

    def call() -> None:
        for function in functions:
            function()

    graph = record(call, repeats)
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        graph.replay()
        torch.cuda.synchronize()
    return median_ms(graph.replay, rounds=15) * 1e3 / (repeats * len(functions))


def copy_rate() -> float:
    """Return bytes a second of a copy within the GPU's memory, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)
