"""What a run would do and why: decided from the graph and from what the store holds, before anything runs."""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from prefixquant.cluster.store import ArtifactCorrupted, ArtifactMissing, ArtifactStore
from prefixquant.pipeline.graph import Estimate, Graph, GraphError, Node
from prefixquant.pipeline.keys import flatten, plain_config

State = Literal["cached", "run", "yielded", "unneeded"]
"""cached: its artifact is stored. run: it runs. yielded: another node's run brings its artifact along.
unneeded: nothing that runs has a use for it."""

_MAX_CHANGES = 3  # named in one reason


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What becomes of one node."""

    node: Node
    key: str
    state: State
    reason: str
    """In plain words, for people."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of every node, in order of execution."""

    entries: tuple[PlanEntry, ...]

    def names(self, state: State) -> tuple[str, ...]:
        """Return the nodes in this state, in order."""
        return tuple(entry.node.name for entry in self.entries if entry.state == state)

    @property
    def total(self) -> Estimate:
        """What the nodes to run cost together: seconds one after the other, the largest memory, bytes read and kept.

        Nodes without an estimate count as nothing.
        """
        nodes = [entry.node for entry in self.entries if entry.state == "run" and entry.node.estimate]
        estimates = [node.estimate for node in nodes if node.estimate]
        return Estimate(
            seconds=sum(each.seconds for each in estimates),
            host_bytes=max((each.host_bytes for each in estimates), default=0),
            device_bytes=max((each.device_bytes for each in estimates), default=0),
            read_bytes=sum(each.read_bytes for each in estimates),
            stored_bytes=sum(n.estimate.stored_bytes for n in nodes if n.estimate and not n.task.ephemeral),
        )


def make_plan(
    graph: Graph, targets: Collection[str], store: ArtifactStore, previous: Mapping[str, str] | None = None
) -> Plan:
    """Return the plan for having the targets' artifacts.

    Args:
        graph: a graph that passes `check`.
        targets: names of the nodes wanted.
        store: what is there already.
        previous: node name -> key in the last run of the same recipe; it serves the reasons only.
    Raises:
        GraphError: a target is not in the graph.
    """
    stored = stored_keys(graph, store)
    states = decide(graph, targets, stored)
    users = {name: _first_user(graph, name, states) for name in graph.order}
    entries = []
    for name in graph.order:
        node = graph.nodes[name]
        reason = _reason(graph, name, states, users[name], stored, store, previous or {})
        entries.append(PlanEntry(node, graph.key(name), states[name], reason))
    return Plan(tuple(entries))


def stored_keys(graph: Graph, store: ArtifactStore) -> set[str]:
    """Return the keys of the graph's nodes whose artifacts the store holds."""
    keys = sorted({graph.key(name) for name in graph.order})
    with ThreadPoolExecutor(16) as pool:  # one round trip each on a remote store
        return {key for key, there in zip(keys, pool.map(store.has, keys), strict=True) if there}


def decide(
    graph: Graph, targets: Collection[str], stored: Collection[str], failed: Collection[str] = ()
) -> dict[str, State]:
    """Return the state of every node, in order; a function of its arguments alone.

    A node is needed if it is a target or an input of a node that runs. Needed and stored: cached. Needed and not
    stored: it runs, unless another node that has to run yields it. One that cannot run by itself makes its yielder run,
    even if that is stored.

    Args:
        graph: a graph that passes `check`.
        targets: names of the nodes wanted.
        stored: keys of stored artifacts.
        failed: nodes that cannot run. What depends on them keeps the state `run`, though it cannot either.
    Raises:
        GraphError: a target is not in the graph.
    """
    unknown = sorted(set(targets) - graph.nodes.keys())
    if unknown:
        raise GraphError(f"targets {unknown} are not in the graph")
    # First as if no byproducts existed: what has to run at most. Then those of them that can run do yield.
    running = {name for name, state in _backward(graph, targets, stored, set()).items() if state == "run"}
    return _backward(graph, targets, stored, running - blocked(graph, stored, failed))


def blocked(graph: Graph, stored: Collection[str], failed: Collection[str]) -> set[str]:
    """Return the nodes that are not stored and have failed or depend on such a node."""
    found: set[str] = set()
    for name in graph.order:
        if graph.key(name) in stored and not graph.is_forced(name, stored):
            continue
        makers = (
            {*graph.parents(name), graph.yielder(name)} if graph.nodes[name].task.run is None else graph.parents(name)
        )
        if name in failed or not found.isdisjoint(makers):
            found.add(name)
    return found


def _backward(graph: Graph, targets: Iterable[str], stored: Collection[str], yielding: set[str]) -> dict[str, State]:
    needed = set(targets)
    forced: set[str] = set()
    states: dict[str, State] = {}
    for name in reversed(graph.order):
        yielder = graph.yielder(name)
        if name not in needed:
            states[name] = "unneeded"
        elif graph.key(name) in stored and name not in forced:
            states[name] = "cached"
        elif yielder is not None and (yielder in yielding or graph.nodes[name].task.run is None):
            states[name] = "yielded"
            needed.add(yielder)
            if graph.nodes[name].task.run is None:
                forced.add(yielder)
        else:
            states[name] = "run"
            needed.update(graph.parents(name))
    return {name: states[name] for name in graph.order}


def _first_user(graph: Graph, name: str, states: Mapping[str, State]) -> str | None:
    return next((user for user in graph.consumers(name) if states[user] == "run"), None)


def _reason(
    graph: Graph,
    name: str,
    states: Mapping[str, State],
    user: str | None,
    stored: Collection[str],
    store: ArtifactStore,
    previous: Mapping[str, str],
) -> str:
    node, yielder, state = graph.nodes[name], graph.yielder(name), states[name]
    if state == "cached":
        return "in the store"
    if state == "unneeded":
        return "all that would read it is done" if node.task.ephemeral else "nothing asked for needs it"
    if state == "yielded":
        return f"comes with {yielder}"
    if graph.key(name) in stored:
        missing = [each for each in node.byproducts.values() if states[each] == "yielded"]
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{missing[0]}{others} is not in the store"
    if name in previous and previous[name] != graph.key(name):
        return _changes(graph, name, store, previous)
    if node.task.ephemeral and user and yielder:  # its yielder does not run, so it was here once
        return f"needed by {user} and no longer stored"
    if node.task.ephemeral and user:
        return f"needed by {user}"
    return "not in the store, unchanged since the last run" if name in previous else "never built"


def _changes(graph: Graph, name: str, store: ArtifactStore, previous: Mapping[str, str]) -> str:
    """Say how the node differs from the last run: its version, its config, its inputs."""
    node = graph.nodes[name]
    changes: list[str] = []
    try:
        meta: Mapping[str, Any] = store.manifest(previous[name]).meta
    except (ArtifactMissing, ArtifactCorrupted):
        meta = {}  # then only the inputs can be compared
    if meta.get("version", node.task.version) != node.task.version:
        changes.append(f"task version {meta['version']} -> {node.task.version}")
    if "config" in meta:
        changes += _config_changes(flatten(meta["config"]), flatten(plain_config(node.config)))
    parents = [parent for parent in graph.parents(name) if previous.get(parent) != graph.key(parent)]
    if parents:
        others = f" and {len(parents) - 1} more" if len(parents) > 1 else ""
        changes.append(f"input {parents[0]}{others} changed")
    return "; ".join(changes) or "settings changed since the last run"


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    paths = [path for path in {**old, **new} if old.get(path, _ABSENT) != new.get(path, _ABSENT)]
    if not paths:
        return []
    shown = [f"{path} {old.get(path, _ABSENT)} -> {new.get(path, _ABSENT)}" for path in paths[:_MAX_CHANGES]]
    more = [f"and {len(paths) - _MAX_CHANGES} more"] if len(paths) > _MAX_CHANGES else []
    return [f"config changed: {', '.join(shown + more)}"]


class _Absent:
    def __str__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()
