"""The schedule of a graph on a number of GPUs, without running it: how long it takes, and what holds it up."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.placement import upward_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How a graph runs on so many slots: GPUs, or cores where there is none."""

    slots: int
    seconds: float
    """From first start to last end."""

    slot_seconds: float
    """Busy, summed over the slots."""

    start: Mapping[str, float]
    """Of each node that runs."""

    critical_seconds: float
    """Of the longest chain of nodes: what any number of slots needs at these costs."""

    critical: Mapping[str, float]
    """That chain's seconds by stage, longest first."""

    @property
    def busy(self) -> float:
        """Part of the slots' time in which they work."""
        return self.slot_seconds / (self.slots * self.seconds) if self.seconds else 1.0


def simulate(graph: Graph, seconds: Mapping[str, float], slots: int, width: Mapping[str, int]) -> Schedule:
    """Return the schedule that the runner's order gives: whatever is ready, the longest way to the end first.

    A slot has one task at a time, though small ones may share a GPU in a run. A node wider than what is free holds
    back nothing: what is ready behind it and fits starts.

    Args:
        graph: a graph that passes `check`.
        seconds: of the nodes that run; those left out take none (done, or yielded by another).
        slots: GPUs, or cores without any.
        width: slots that a node needs, 1 where left out; 0 for what waits for none. At most `slots`.
    """
    ranks = upward_ranks(graph, seconds)
    waits = {name: len(_before(graph, name)) for name in graph.order}
    after: dict[str, list[str]] = {name: [] for name in graph.order}
    for name in graph.order:
        for other in _before(graph, name):
            after[other].append(name)
    ready = [(-ranks[name], index, name) for index, name in enumerate(graph.order) if not waits[name]]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now, free, busy = 0.0, slots, 0.0
    start: dict[str, float] = {}
    position = {name: index for index, name in enumerate(graph.order)}
    while ready or running:
        held = []
        while ready:
            item = heapq.heappop(ready)
            name = item[2]
            wide = min(width.get(name, 1), slots) if name in seconds else 0
            if wide > free:
                held.append(item)
                continue
            free -= wide
            busy += wide * seconds.get(name, 0.0)
            start[name] = now
            heapq.heappush(running, (now + seconds.get(name, 0.0), name))
        for item in held:
            heapq.heappush(ready, item)
        now, name = heapq.heappop(running)
        free += min(width.get(name, 1), slots) if name in seconds else 0
        for other in after[name]:
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, (-ranks[other], position[other], other))
    longest, chain = _longest_chain(graph, seconds, ranks)
    return Schedule(slots=slots, seconds=now, slot_seconds=busy, start=start, critical_seconds=longest, critical=chain)


def _before(graph: Graph, name: str) -> tuple[str, ...]:
    yielder = graph.yielder(name)
    return graph.parents(name) if yielder is None or yielder in graph.parents(name) else (*graph.parents(name), yielder)


def _longest_chain(
    graph: Graph, seconds: Mapping[str, float], ranks: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """Return the length of the longest chain and its seconds by stage."""
    if not graph.order:
        return 0.0, {}
    name: str | None = max(graph.order, key=lambda each: ranks[each])
    longest = ranks[name] if name is not None else 0.0
    stages: dict[str, float] = {}
    while name is not None:
        stage = graph.nodes[name].task.name
        stages[stage] = stages.get(stage, 0.0) + seconds.get(name, 0.0)
        following = (*graph.consumers(name), *graph.nodes[name].byproducts.values())
        name = max(following, key=lambda each: ranks[each], default=None)
    return longest, dict(sorted(stages.items(), key=lambda item: -item[1]))
