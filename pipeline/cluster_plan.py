"""A run on a cluster that is not there yet: what does not fit and what would, how long it takes on how many GPUs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from prefixquant.pipeline.estimates import estimate
from prefixquant.pipeline.graph import Graph, Node
from prefixquant.pipeline.machines import Machine
from prefixquant.pipeline.placement import GPU_CONTEXT_BYTES, ranks_for
from prefixquant.pipeline.shape import Shape
from prefixquant.pipeline.simulate import Schedule, simulate
from prefixquant.tasks.errors import ConfigError

_GB = 1e9


class DoesNotFitError(ConfigError):
    """The run does not fit the cluster; the message says what would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes that are alike."""

    machine: Machine
    """Its GPUs, or its cores where there is none."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    host_bytes: float | None
    """Memory of a node; None: not said, so not checked."""

    disk_bytes: float | None
    """Room for the store and the streams; None: not said, so not checked."""

    @property
    def slots(self) -> int:
        """Tasks of one GPU, or core without any, that run at once."""
        return self.nodes * (self.gpus_per_node or self.cpus_per_node)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node


def check_fits(graph: Graph, names: Collection[str], shape: Shape, cluster: Cluster, ranks: int | None) -> None:
    """Return if every node to run fits; otherwise raise DoesNotFitError with a line for each stage that does not.

    Args:
        graph: of the run.
        names: the nodes that will run.
        shape: sizes of the run.
        cluster: where.
        ranks: processes of a training node; None: as many as the GPUs allow.
    """
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for name in names:
        node = graph.nodes[name]
        cost = estimate(node, shape, cluster.machine, ranks_of(node, cluster.slots, ranks))
        needs = {"device": float(cost.device_bytes), "host": float(cost.host_bytes), "disk": float(cost.disk_bytes)}
        for kind, need in needs.items():
            most = worst.get((node.task.name, kind), (-1.0, ""))
            worst[node.task.name, kind] = max(most, (need, name))
    room = {
        "device": cluster.machine.memory_bytes - GPU_CONTEXT_BYTES if cluster.gpus else None,
        "host": cluster.host_bytes,
        "disk": cluster.disk_bytes,
    }
    lines = []
    for (_, kind), (need, name) in worst.items():
        has = room[kind]
        if has is not None and need > has:
            lines.append(_refusal(graph.nodes[name], kind, need, has, shape, cluster, ranks))
    stored = _store_bytes(graph, names)
    if cluster.disk_bytes is not None and stored > cluster.disk_bytes:
        lines.append(
            f"store: {stored / _GB:.1f} GB are kept and the disk has {cluster.disk_bytes / _GB:.1f} GB; "
            f"a store elsewhere (--store s3://...) would do, or a disk of {_round(stored)} GB"
        )
    if lines:
        raise DoesNotFitError("\n".join(lines))


def _refusal(node: Node, kind: str, need: float, has: float, shape: Shape, cluster: Cluster, ranks: int | None) -> str:
    where = {"device": "GPU memory", "host": "host memory", "disk": "local disk"}[kind]
    ways = list(_ways(node, kind, has, shape, cluster, ranks))
    own = {"device": "a GPU with", "host": "nodes with", "disk": "a disk with"}[kind]
    extra = GPU_CONTEXT_BYTES if kind == "device" else 0
    ways.append(f"{own} {_round(need + extra)} GB")
    return (
        f"{node.name} needs {need / _GB:.1f} GB of {where}, there are {has / _GB:.1f} GB; what would do: "
        f"{', or '.join(ways)}"
    )


def _round(size: float) -> int:
    return int(-(-size // _GB))


def _ways(node: Node, kind: str, has: float, shape: Shape, cluster: Cluster, ranks: int | None) -> Iterator[str]:
    """Give the changes that make the node fit, each tried on the estimate."""

    def fits(node: Node = node, shape: Shape = shape, ranks: int = 1) -> bool:
        cost = estimate(node, shape, cluster.machine, ranks)
        return {"device": cost.device_bytes, "host": cost.host_bytes, "disk": cost.disk_bytes}[kind] <= has

    if node.task.name in ("train", "polish"):
        yield from _training_ways(node, kind, fits, ranks_of(node, cluster.slots, ranks))
        return
    for key, field, sequences in (
        ("data.search.sequences", "search_tokens", shape.sequences["search"]),
        ("data.statistics.sequences", "statistics_tokens", shape.sequences["statistics"]),
    ):
        tokens = getattr(shape, field)
        for fewer in _halves(sequences):
            if fits(shape=replace(shape, **{field: tokens // sequences * fewer})):
                yield f"{key}={fewer}"
                break
    if node.task.name in ("evaluate", "evaluate_part"):
        for windows in _halves(shape.evaluation_tokens // shape.window):
            if fits(shape=replace(shape, evaluation_tokens=windows * shape.window)):
                yield f"evaluate.max_windows={windows}"
                break


def _training_ways(node: Node, kind: str, fits: Callable[..., bool], ranks: int) -> Iterator[str]:
    train = node.config.train

    def changed(**changes: object) -> Node:
        return replace(node, config=replace(node.config, train=replace(train, **changes)))

    if kind != "disk" and not train.offload_to_disk and fits(node=changed(offload_to_disk=True), ranks=ranks):
        yield "train.offload_to_disk=true"
    if kind == "device":
        for more in range(ranks + 1, train.batch_size + 1):
            if train.batch_size % more == 0 and fits(ranks=more):
                yield f"{more} GPUs a segment (--ranks {more})"
                break
        for batch in _halves(train.batch_size):
            if batch % ranks == 0 and train.validation_sequences % batch == 0 and fits(node=changed(batch_size=batch)):
                yield f"train.batch_size={batch}"
                break
        if train.lookahead and fits(node=changed(lookahead=0), ranks=ranks):
            yield "train.lookahead=0"
    for sequences in _halves(train.sequences):
        if sequences % train.batch_size == 0 and fits(node=changed(sequences=sequences), ranks=ranks):
            yield f"train.sequences={sequences}"
            break


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _store_bytes(graph: Graph, names: Collection[str]) -> int:
    """Return the bytes that the run leaves in the store. A training node's artifact is what it yields."""
    costs = [graph.nodes[name].estimate for name in names if not graph.nodes[name].task.ephemeral]
    return sum(cost.stored_bytes for cost in costs if cost is not None)


def ranks_of(node: Node, gpus: int, ranks: int | None) -> int:
    """Return the processes that the runner gives a node."""
    gang = node.resources.gang
    if gang is None:
        return 1
    return ranks if ranks is not None else ranks_for(gpus, gang.shares, gang.batch)


def schedule_of(graph: Graph, names: Collection[str], shape: Shape, cluster: Cluster, ranks: int | None) -> Schedule:
    """Return the schedule of the nodes that run on a cluster.

    On nodes with several GPUs every task starts a worker of its own, since a process sees one GPU for its life.
    """
    seconds: dict[str, float] = {}
    width: dict[str, int] = {}
    for name in names:
        node = graph.nodes[name]
        cheap = node.resources.cpus == 0
        processes = ranks_of(node, cluster.slots, ranks)
        of_each = max(1, int(node.resources.gpus)) if cluster.gpus else 1
        width[name] = 0 if cheap else min(processes * of_each, cluster.slots)
        starts = cluster.gpus > 1 and not cheap
        cost = estimate(node, shape, cluster.machine, processes)
        seconds[name] = cost.seconds + (cluster.machine.worker_s if starts else 0.0)
    return simulate(graph, seconds, cluster.slots, width)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingRow:
    """The run on a number of GPUs."""

    gpus: int
    segments: int
    ranks: int
    """Of each segment."""

    schedule: Schedule

    @property
    def gpu_hours(self) -> float:
        """Hours for which the GPUs are held."""
        return self.gpus * self.schedule.seconds / 3600


def scaling(
    graph_of: Callable[[int, int], Graph],
    names_of: Callable[[Graph], Collection[str]],
    shape: Shape,
    machine: Machine,
    counts: Sequence[int],
    segments: Sequence[int],
    gpus_per_node: int = 8,
) -> list[ScalingRow]:
    """Return for each number of GPUs and of segments the schedule of the run; segments beyond the GPUs are left out.

    `graph_of(gpus, segments)` builds the graph that a run on so many GPUs has, `names_of` its nodes that run. Raises
    ConfigError for a count that is neither part of a node nor whole nodes.
    """
    odd = [gpus for gpus in counts if gpus < 1 or (gpus > gpus_per_node and gpus % gpus_per_node)]
    if odd:
        raise ConfigError(f"{odd[0]} GPUs are no whole nodes of {gpus_per_node}; give fewer, or a multiple")
    rows = []
    for gpus in counts:
        cluster = Cluster(
            machine=machine,
            nodes=-(-gpus // gpus_per_node),
            gpus_per_node=min(gpus, gpus_per_node),
            cpus_per_node=16,
            host_bytes=None,
            disk_bytes=None,
        )
        for count in segments:
            if count > gpus:
                continue
            graph = graph_of(gpus, count)
            gangs = [node for node in graph.nodes.values() if node.resources.gang is not None]
            ranks = max((ranks_of(node, cluster.slots, None) for node in gangs), default=1)
            schedule = schedule_of(graph, names_of(graph), shape, cluster, None)
            rows.append(ScalingRow(gpus=gpus, segments=count, ranks=ranks, schedule=schedule))
    return rows


def limits(row: ScalingRow) -> str:
    """Return in words what holds the schedule up."""
    schedule = row.schedule
    chain = ", ".join(f"{stage} {seconds / 60:.0f} min" for stage, seconds in list(schedule.critical.items())[:3])
    share = schedule.critical_seconds / schedule.seconds if schedule.seconds else 0.0
    if share > 0.9:
        return f"the longest chain ({chain}): more GPUs change nothing"
    return f"work, the GPUs are busy {schedule.busy:.0%} of the time; the longest chain is {share:.0%} of it ({chain})"
