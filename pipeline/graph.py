"""The DAG as a plain value: built, checked, printed; running it is the runner's business."""

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from prefixquant.pipeline.keys import node_key, plain_config
from prefixquant.tasks.errors import PrefixQuantError

if TYPE_CHECKING:  # a graph is planned without importing torch
    from prefixquant.pipeline.worker import TaskContext, TaskOutput


class GraphError(PrefixQuantError):
    """The graph has a cycle, a missing input or an ambiguous producer. A mistake of ours, not of the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """How a node spreads over several processes that work together."""

    batch: int
    """What they share equally: their number divides it."""

    shares: int = 1
    """Such nodes that run at the same time, among which the GPUs are divided."""

    sharding: str = "rows"
    """How the processes divide what they train (`TrainConfig.sharding`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one execution of a node occupies."""

    gpus: float = 0
    """A fraction below 1, or a whole number. Honoured only if the cluster has GPUs; otherwise the task runs on CPU."""

    cpus: int = 1
    """CPU cores, which is also the number of torch threads. 0: so cheap that it waits for no core."""

    gang: Gang | None = None
    """Given: it may run as several processes, and the others are of each. None: it is one process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a node is expected to cost."""

    seconds: float
    """Wall clock."""

    host_bytes: int
    """Peak memory of the worker process."""

    device_bytes: int
    """Peak memory on the GPU, 0 on CPU."""

    stored_bytes: int
    """Size of the artifact."""

    read_bytes: int = 0
    """Read from store and checkpoint."""

    disk_bytes: int = 0
    """Of the local disk while it runs, the store aside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One kind of work."""

    name: str
    """Also the name of the stage in progress and reports."""

    version: int
    """Raise it when the same inputs should give other numbers."""

    run: "Callable[[TaskContext], TaskOutput] | None"
    """A function at module level, so that workers can import it. None: only the node that yields it can make it."""

    ephemeral: bool = False
    """Its artifact goes once every consumer is done, and comes back only when a consumer must run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One execution of a task, and the artifact it gives."""

    name: str
    """Unique in the graph; for people. `block[3]`."""

    task: Task
    """What runs."""

    config: Any = None
    """A frozen dataclass of JSON types, or None. Part of the key."""

    inputs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Argument -> the node, or nodes, whose artifacts it is."""

    key_inputs: Mapping[str, str | tuple[str, ...]] | None = None
    """What the key is made of in place of `inputs`, where those are parts whose number does not change the artifact.
    None: the inputs."""

    byproducts: Mapping[str, str] = field(default_factory=dict)
    """Label in `TaskOutput.byproducts` -> the node whose artifact this run yields as well."""

    resources: Resources = Resources()
    """What it occupies while it runs."""

    estimate: Estimate | None = None
    """What it should cost, where known."""

    def meta(self) -> dict[str, Any]:
        """Return what the manifest of its artifact says of it."""
        plain = plain_config(self.config)
        return {"task": self.task.name, "version": self.task.version, "config": plain, "node": self.name}


class Graph:
    """Nodes by name, with their order and keys. Call `check` once after building it.

    Everything but `nodes` raises GraphError on a graph that `check` refuses.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._declared = tuple(nodes)
        self.nodes: dict[str, Node] = {node.name: node for node in self._declared}

    def check(self) -> None:
        """Return if the graph can run. Raises GraphError on a cycle, a missing input or two producers of one node."""
        _ = self.order

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Names such that producers come first, otherwise as declared. A byproduct comes after the node yielding it."""
        self._check_names()
        index = {name: i for i, name in enumerate(self.nodes)}
        sorter = TopologicalSorter(
            {
                name: {*_producers(node), *_key_producers(node), *self._yielders.get(name, ())}
                for name, node in self.nodes.items()
            }
        )
        try:
            sorter.prepare()
        except CycleError as err:
            raise GraphError(f"the graph has a cycle: {' -> '.join(err.args[1])}") from None
        order: list[str] = []
        ready = [index[name] for name in sorter.get_ready()]
        heapq.heapify(ready)
        while ready:
            name = self._declared[heapq.heappop(ready)].name
            order.append(name)
            sorter.done(name)
            for freed in sorter.get_ready():
                heapq.heappush(ready, index[freed])
        return tuple(order)

    def parents(self, name: str) -> tuple[str, ...]:
        """Return the producers of the node's inputs, each once, in the order of the arguments."""
        return self._parents[name]

    def consumers(self, name: str) -> tuple[str, ...]:
        """Return the nodes that take this one's artifact as an input, in order."""
        return self._consumers[name]

    def yielder(self, name: str) -> str | None:
        """Return the node whose run yields this one's artifact as a byproduct, or None."""
        return next(iter(self._yielders.get(name, ())), None)

    def is_forced(self, name: str, stored: Collection[str]) -> bool:
        """Return whether an artifact that only this node can make is not among the stored keys."""
        products = self.nodes[name].byproducts.values()
        return any(self.nodes[each].task.run is None and self.key(each) not in stored for each in products)

    def key(self, name: str) -> str:
        """Return the key of the node's artifact. Raises ConfigError if its config is not made of JSON types."""
        return self._keys[name]

    def input_keys(self, name: str) -> dict[str, str | tuple[str, ...]]:
        """Return argument -> key, or keys, of the producers' artifacts."""
        return _resolve(self.nodes[name].inputs, self._keys)

    def names_of(self, key: str) -> tuple[str, ...]:
        """Return the nodes with this key, in order: none, one, or several that ask for the same work."""
        return tuple(name for name in self.order if self._keys[name] == key)

    @cached_property
    def _keys(self) -> dict[str, str]:
        keys: dict[str, str] = {}
        for name in self.order:
            node = self.nodes[name]
            identity = node.inputs if node.key_inputs is None else node.key_inputs
            keys[name] = node_key(node.task.name, node.task.version, node.config, _resolve(identity, keys))
        return keys

    @cached_property
    def _parents(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(dict.fromkeys(_producers(self.nodes[name]))) for name in self.order}

    @cached_property
    def _consumers(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {name: [] for name in self.order}
        for name, parents in self._parents.items():
            for parent in parents:
                found[parent].append(name)
        return {name: tuple(consumers) for name, consumers in found.items()}

    @cached_property
    def _yielders(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for node in self._declared:
            for product in node.byproducts.values():
                found.setdefault(product, []).append(node.name)
        return found

    def _check_names(self) -> None:
        if len(self.nodes) < len(self._declared):
            names = [node.name for node in self._declared]
            raise GraphError(f"two nodes are named {next(name for name in names if names.count(name) > 1)!r}")
        for node in self._declared:
            for wanted in (*_producers(node), *_key_producers(node), *node.byproducts.values()):
                if wanted not in self.nodes:
                    raise GraphError(f"node {node.name!r} refers to {wanted!r}, which the graph does not have")
        for node in self._declared:
            if node.task.run is None and node.name not in self._yielders:
                raise GraphError(f"no node yields {node.name!r}, whose task {node.task.name!r} cannot run by itself")
        for product, yielders in self._yielders.items():
            if len(yielders) > 1:
                raise GraphError(f"both {yielders[0]!r} and {yielders[1]!r} yield {product!r}; one must")
            if self.nodes[product].byproducts:
                raise GraphError(f"{product!r} is a byproduct of {yielders[0]!r} and cannot have byproducts of its own")


def _producers(node: Node) -> list[str]:
    return _names(node.inputs)


def _key_producers(node: Node) -> list[str]:
    return _names(node.key_inputs or {})


def _names(inputs: Mapping[str, str | tuple[str, ...]]) -> list[str]:
    return [name for value in inputs.values() for name in ((value,) if isinstance(value, str) else value)]


def _resolve(inputs: Mapping[str, str | tuple[str, ...]], keys: Mapping[str, str]) -> dict[str, str | tuple[str, ...]]:
    return {
        arg: keys[producer] if isinstance(producer, str) else tuple(keys[each] for each in producer)
        for arg, producer in inputs.items()
    }
