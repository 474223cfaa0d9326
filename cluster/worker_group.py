"""Run a function on several processes at once that know each other: Ray actors in one placement group."""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixquant.cluster.errors import ResourceError
from prefixquant.cluster.ray_session import TaskLostError, first_line

_POLL_S = 1.0  # Ray delivers an interrupt only between its calls
_PING_TIMEOUT_S = 20.0  # a process that does not answer for so long is lost with its node
_SECONDARY_S = 5.0  # in which the rank that is to blame for a broken connection must have shown up
_SHRUNK_TIMEOUT_S = 120.0  # for a lost node to come back

_Actor = Any
_Ref = Any


@dataclass(frozen=True, slots=True)
class Membership:
    """A process's place in its group."""

    rank: int
    """From 0."""

    size: int
    """How many processes the group has."""

    master_addr: str
    """Address of the node of rank 0."""

    master_port: int
    """A port that was free there when the group started."""


def run_group(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    ranks: int,
    cpus: float,
    gpus: float,
    max_restarts: int = 2,
    name: str,
) -> Any:
    """Return what `function(member, *args)` returns on rank 0 of a group of processes that all call it.

    If a process or its node dies, or the function raises OSError, the whole group is ended and started again. Any
    other error of the function ends the group at once. Nothing of the group is left when this returns or raises,
    be it by an interrupt; what the death of the calling process leaves, Ray's next attempt at its task cleans up.

    Args:
        function: takes a Membership and then `args`. Runs in a thread of the process that is not the main one.
        args: picklable.
        ranks: how many processes.
        cpus: of each process; may be a fraction, must be above 0.
        gpus: of each process.
        max_restarts: how often the group is started again.
        name: for messages and for Ray's lists.
    Raises:
        ResourceError: the cluster does not have that much, be it idle.
        TaskLostError: a process was lost more than `max_restarts` times.
        Exception: what the function raised, chained to the worker's traceback.
    """
    if ranks < 1 or cpus <= 0 or gpus < 0:
        raise ResourceError(
            f"{name}: wanted at least 1 rank and some CPU, got {ranks} ranks of {cpus} CPUs, {gpus} GPUs"
        )
    bundle = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    places = _place_names(name, max_restarts + 1)
    for attempt, place in enumerate(places):
        last = attempt == max_restarts
        try:
            return _run_once(function, args, ranks, bundle, name, place, grace_s=_SHRUNK_TIMEOUT_S if attempt else 0.0)
        except _RankLost as err:
            if last:
                raise TaskLostError(
                    f"{name}: rank {err.rank} of {ranks} was lost in attempt {attempt + 1} of {max_restarts + 1}: {err}"
                ) from err.__cause__
        except OSError:
            if last:
                raise
    raise AssertionError("the last attempt returns or raises")


class _RankLost(Exception):  # noqa: N818 - named for the state it reports
    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class _Rank:
    """The actor of one process. `alive` answers from a thread of its own while `run` runs."""

    def address(self) -> tuple[str, int]:
        import ray

        here = ray.get_runtime_context().get_node_id()
        host = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
        with socket.create_server((host, 0)) as place:
            return host, place.getsockname()[1]

    def run(self, function: Callable[..., Any], member: Membership, args: Sequence[Any]) -> Any:
        result = function(member, *args)
        return result if member.rank == 0 else None

    def alive(self) -> None:
        pass


def _run_once(
    function: Callable[..., Any],
    args: Sequence[Any],
    ranks: int,
    bundle: Mapping[str, float],
    name: str,
    place: str,
    grace_s: float,
) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    _await_capacity(ranks, bundle, name, grace_s)
    group = ray.util.placement_group([dict(bundle)] * ranks, strategy="PACK", name=place)
    actors: list[_Actor] = []
    try:
        while not group.wait(_POLL_S):
            _await_capacity(ranks, bundle, name, _SHRUNK_TIMEOUT_S)
        options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "concurrency_groups": {"health": 1}}
        actor = ray.remote(**options)(_Rank)
        for rank in range(ranks):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            actors.append(actor.options(name=None, scheduling_strategy=strategy).remote())
        host, port = _address(actors[0])
        runs = {
            actor.run.remote(function, Membership(rank, ranks, host, port), args): rank
            for rank, actor in enumerate(actors)
        }
        return _collect(runs, actors)
    finally:
        for each in actors:
            ray.kill(each)
        ray.util.remove_placement_group(group)


def _address(actor: _Actor) -> tuple[str, int]:
    import ray

    ref = actor.address.remote()
    while not ray.wait([ref], timeout=_POLL_S)[0]:
        pass
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as err:
        raise _RankLost(0, first_line(err)) from err


def _collect(runs: Mapping[_Ref, int], actors: Sequence[_Actor]) -> Any:
    """Wait for every rank and return the result of rank 0; raise _RankLost, or what a rank raised."""
    import ray

    pending, result = dict(runs), None
    while pending:
        for ref in ray.wait(list(pending), timeout=_POLL_S)[0]:
            rank = pending.pop(ref)
            try:
                value = ray.get(ref)
            except ray.exceptions.RayTaskError as err:
                _check_alive({other: actors[other] for other in pending.values()})
                first = _original(err, pending)
                raise first.cause from first
            except ray.exceptions.TaskCancelledError:
                raise
            except ray.exceptions.RayError as err:
                raise _RankLost(rank, first_line(err)) from err
            result = value if rank == 0 else result
    return result


def _check_alive(actors: Mapping[int, _Actor]) -> None:
    """Raise _RankLost if one of the processes is gone: then an error of another rank is but the consequence."""
    import ray

    pings = {actor.alive.options(concurrency_group="health").remote(): rank for rank, actor in actors.items()}
    if not pings:
        return
    answered, silent = ray.wait(list(pings), num_returns=len(pings), timeout=_PING_TIMEOUT_S)
    for ref in answered:
        try:
            ray.get(ref)
        except ray.exceptions.RayError as err:
            raise _RankLost(pings[ref], first_line(err)) from err
    if silent:
        raise _RankLost(pings[silent[0]], f"no answer within {_PING_TIMEOUT_S:g} s")


def _original(err: Any, pending: Mapping[_Ref, int]) -> Any:
    """Return the RayTaskError of the rank that is to blame.

    When a rank raises and leaves, the others find their connection broken, which torch reports as RuntimeError, and
    theirs may be the first to be heard.
    """
    import ray

    if not pending or not isinstance(err.cause, RuntimeError):
        return err
    ended, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_SECONDARY_S)
    for ref in ended:
        try:
            ray.get(ref)
        except ray.exceptions.RayTaskError as other:
            if not isinstance(other.cause, RuntimeError):
                return other
        except ray.exceptions.RayError as lost:
            raise _RankLost(pending[ref], first_line(lost)) from lost
    return err


def _await_capacity(ranks: int, bundle: Mapping[str, float], name: str, grace_s: float) -> None:
    """Raise ResourceError if for `grace_s` seconds the nodes, be they idle, have no room for the group."""
    import ray

    deadline = time.monotonic() + grace_s
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(int(min(node.get(kind, 0.0) / amount for kind, amount in bundle.items())) for node in nodes)
        if room >= ranks:
            return
        if time.monotonic() >= deadline:
            has = ", ".join(f"{sum(node.get(kind, 0.0) for node in nodes):g} {kind}" for kind in ("CPU", "GPU"))
            wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
            raise ResourceError(
                f"{name}: {ranks} ranks of {wanted} each do not fit on the cluster, which has room for {room} "
                f"({len(nodes)} nodes, {has}); ask for fewer ranks or less for each, or add nodes"
            )
        time.sleep(_POLL_S)


def _place_names(name: str, attempts: int) -> list[str]:
    """Return a name for the placement group of each attempt, and remove what an earlier try of this task left."""
    import ray

    task = ray.get_runtime_context().get_task_id() or "driver"
    names = [f"{name} {task} {attempt}" for attempt in range(attempts)]
    for each in names:
        try:
            left = ray.util.get_placement_group(each)
        except ValueError:
            continue
        ray.util.remove_placement_group(left)
    return names
