"""What a node asks of the cluster, and in which order and how many nodes are handed to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prefixquant.pipeline.graph import Graph, Node

GPU_CONTEXT_BYTES = 700 * 2**20
"""Of a process on a GPU before it holds a tensor: context, libraries, workspaces."""

MARGIN = 1.15
"""Predicted memory is good to 15 %."""

_SHARES = 8
"""Fractions of a GPU are multiples of one over this. More processes than that only take each other's turns."""

AHEAD = 2
"""Work handed to the cluster at once, over what it can run at once. Enough that no worker waits for the driver; the
order of the rest stays ours to choose, and nothing piles up in the cluster's queues."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What one execution of a node asks for."""

    cpus: int
    """0: it starts whatever else runs."""

    gpus: float
    """A fraction up to a half, or a whole number."""

    memory_bytes: int
    """Of the host."""

    disk_bytes: int
    """Of the node's local disk, while it runs."""


def request_of(node: Node, gpu_bytes: float | None) -> Request:
    """Return what a node asks for: its declared resources, a GPU shared if its predicted memory leaves room.

    `gpu_bytes`: memory of a GPU; None: not known, so no GPU is shared.
    """
    resources, cost = node.resources, node.estimate
    if resources.cpus == 0 or cost is None:  # cheap, or nothing is known
        return Request(cpus=resources.cpus, gpus=resources.gpus, memory_bytes=0, disk_bytes=0)
    return Request(
        cpus=resources.cpus,
        gpus=gpu_share(cost.device_bytes, gpu_bytes) if resources.gpus == 1 else resources.gpus,
        memory_bytes=cost.host_bytes,
        disk_bytes=cost.disk_bytes,
    )


def gpu_share(device_bytes: float, gpu_bytes: float | None) -> float:
    """Return the part of a GPU that a task with so many bytes on it needs: an eighth at least, 1 above a half."""
    if not gpu_bytes or not device_bytes:
        return 1.0
    share = math.ceil(_SHARES * (MARGIN * device_bytes + GPU_CONTEXT_BYTES) / gpu_bytes) / _SHARES
    return share if share <= 0.5 else 1.0


def ranks_for(gpus: int, shares: int, batch: int) -> int:
    """Return the processes of a node that shares the GPUs with others like it: the most that divide its batch."""
    most = min(max(1, gpus // shares), batch)
    return max(ranks for ranks in range(1, most + 1) if batch % ranks == 0)


def upward_ranks(graph: Graph, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return for each node the seconds from its start to the end of all that waits for it, if nothing else delays it.

    The largest goes first: it lies on the longest path (Topcuoglu et al., 2002, "upward rank").
    """
    ranks: dict[str, float] = {}
    for name in reversed(graph.order):
        waiting = (*graph.consumers(name), *graph.nodes[name].byproducts.values())
        ranks[name] = seconds.get(name, 0.0) + max((ranks[each] for each in waiting), default=0.0)
    return ranks


class Admission:
    """How much is under way, and whether more may be handed over.

    Nodes of zero CPUs always may. GPU tasks and CPU tasks are counted apart, so neither kind waits for the other here.
    """

    def __init__(self, cpus: float, gpus: float, *, streams: int) -> None:
        """`cpus` and `gpus` of the cluster; `streams`: most ephemeral artifacts that wait for a reader."""
        self._limit = {"cpu": AHEAD * max(1.0, cpus), "gpu": AHEAD * max(1.0, gpus)}
        self._used = {"cpu": 0.0, "gpu": 0.0}
        self._streams = streams
        self._admitted: dict[str, tuple[str, float]] = {}

    def admit(self, name: str, request: Request, ranks: int = 1, *, waiting_streams: int | None = None) -> bool:
        """Return whether the node may be handed over now, and if so count it until `end`.

        The first of its kind always may; then nothing can wait for ever. `request` is of each of the node's ranks.
        `waiting_streams`: of a node whose artifact is ephemeral, how many of these there are already.
        """
        if request.cpus == 0:
            return True
        kind, amount = ("gpu", ranks * request.gpus) if request.gpus else ("cpu", float(ranks * request.cpus))
        if self._used[kind] and self._used[kind] + amount > self._limit[kind]:
            return False
        if waiting_streams is not None and self._admitted and waiting_streams >= self._streams:
            return False
        self._used[kind] += amount
        self._admitted[name] = (kind, amount)
        return True

    def end(self, name: str) -> None:
        """Count a node no more."""
        if name in self._admitted:
            kind, amount = self._admitted.pop(name)
            self._used[kind] -= amount
            if not any(other == kind for other, _ in self._admitted.values()):
                self._used[kind] = 0.0  # no rest of rounding
