"""Run a graph: submit what is ready, wait for one to end, decide again from what the store then holds."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Literal

from torch import OutOfMemoryError

from prefixquant.cluster.errors import ArtifactCorrupted, ArtifactMissing
from prefixquant.cluster.inline_session import InlineSession
from prefixquant.cluster.ray_session import RaySession, Ref, first_line
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.access import Byproduct
from prefixquant.pipeline.graph import Graph, Node
from prefixquant.pipeline.outcome import Event, EventKind, NodeFailure, Outcome, RunResult
from prefixquant.pipeline.placement import Admission, Request, ranks_for, request_of, upward_ranks
from prefixquant.pipeline.plan import State, blocked, decide, stored_keys
from prefixquant.pipeline.worker import NodeCall, NodeResult, run_member, run_node
from prefixquant.tasks.errors import ConfigError

_MAX_REPAIRS = 2  # of one artifact
_STREAMS_A_SLOT = 4  # ephemeral artifacts that wait for a reader, for each GPU, or core without one
_POLL_S = 1.0  # so that signals are heard while tasks run

Session = RaySession | InlineSession
"""Where a run's tasks go."""


def execute(
    graph: Graph,
    targets: Collection[str],
    store: ArtifactStore,
    session: Session,
    *,
    ranks: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> RunResult:
    """Build what the targets lack and return what became of every node.

    A task that raises fails its node; what does not depend on it goes on and is stored. A damaged input is discarded
    and built again. SIGINT or SIGTERM ends the run; what is under way ends with the session. In each case the published
    artifacts stay, and the next call goes on from them.

    Args:
        graph: a graph that passes `check`.
        targets: names of the nodes wanted; GraphError if one is unknown.
        store: must be reachable by the same URL from every worker.
        session: where to run.
        ranks: processes of a node that may run as several; None: as many as the GPUs allow.
        on_event: called from this thread; what it raises ends the run.
    """
    session.messages()  # those of an earlier run are of no use
    run = _Run(graph, targets, store, session, ranks, on_event)
    interrupted = False
    with _sigterm_as_sigint():
        try:
            run.loop()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            session.abandon(list(run.pending))
    return run.finish(interrupted)


class _Run:
    """The state of one run. What to do next follows from `stored` and `failures`; everything else is bookkeeping."""

    def __init__(
        self,
        graph: Graph,
        targets: Collection[str],
        store: ArtifactStore,
        session: Session,
        ranks: int | None,
        on_event: Callable[[Event], None],
    ) -> None:
        self.graph, self.targets, self.store, self.session, self.on_event = graph, targets, store, session, on_event
        self.ranks = ranks
        self.start = time.monotonic()
        self.stored = stored_keys(graph, store)
        self.states: dict[str, Outcome] = {}
        self.results: dict[str, NodeResult] = {}
        self.failures: dict[str, NodeFailure] = {}
        self.repairs: Counter[str] = Counter()
        self.reduced: set[str] = set()
        self.pending: dict[Ref, str] = {}
        durable = [name for name in graph.order if not graph.nodes[name].task.ephemeral]
        self.kept = {*targets, *durable}
        self.requests = {name: self.request(node) for name, node in graph.nodes.items()}
        slots = session.gpus or session.cpus
        self.admission = Admission(session.cpus, session.gpus, streams=_STREAMS_A_SLOT * slots)
        costs = {name: node.estimate.seconds if node.estimate else 1.0 for name, node in graph.nodes.items()}
        ranks_up = upward_ranks(graph, costs)
        self.first_to_last = sorted(graph.order, key=lambda name: -ranks_up[name])

    def loop(self) -> None:
        """Return when nothing is running and nothing more can be started."""
        while True:
            self.discard_spent()
            self.submit_ready()
            if not self.pending:
                return
            ended = self.session.wait(list(self.pending), timeout=_POLL_S)
            self.read_messages()
            for ref in ended:
                self.collect(ref)

    def submit_ready(self) -> None:
        """Start nodes that have to run and have their inputs, the longest way to the end first, while there is room.

        The cluster gets little more than it can run at once (`placement.Admission`).
        """
        states = decide(self.graph, self.targets, self.stored, self.failures)
        busy = {self.graph.key(name) for name in self.pending.values()}
        found = False
        for name, state in states.items():
            if state == "cached" and name not in self.states:
                self.set_state(name, "cached")
        for name in self.first_to_last:
            if states[name] != "run" or name in self.failures:
                continue
            key = self.graph.key(name)
            if key in busy or any(self.graph.key(parent) not in self.stored for parent in self.graph.parents(name)):
                continue
            if key not in self.stored and self.store.has(key):  # another run was faster
                products = [self.graph.key(each) for each in self.graph.nodes[name].byproducts.values()]
                self.stored.update([key, *(each for each in products if self.store.has(each))])
                self.set_state(name, "cached")
                found = True
                continue
            node = self.graph.nodes[name]
            streams = self.waiting_streams() if node.task.ephemeral else None
            if not self.admission.admit(name, self.requests[name], self.num_ranks(node), waiting_streams=streams):
                continue
            self.submit(name)
            busy.add(key)
        if found:
            self.submit_ready()

    def waiting_streams(self) -> int:
        """Return how many ephemeral artifacts there are or are in the making."""
        names = [name for name, node in self.graph.nodes.items() if node.task.ephemeral]
        under_way = set(self.pending.values())
        return sum(self.graph.key(name) in self.stored or name in under_way for name in names)

    def submit(self, name: str) -> None:
        node, request = self.graph.nodes[name], self.requests[name]
        later, gang = self.decide_rest(), node.resources.gang
        byproducts = {
            label: Byproduct(
                key=self.graph.key(product),
                meta=self.graph.nodes[product].meta(),
                wanted=later[product] in ("yielded", "run"),
            )
            for label, product in node.byproducts.items()
        }
        call = NodeCall(
            store_url=self.store.url,
            node=name,
            task=node.task,
            config=node.config,
            key=self.graph.key(name),
            input_keys=self.graph.input_keys(name),
            byproducts=byproducts,
            cpus=max(1, request.cpus),
            mailbox=self.session.mailbox() if gang is not None else None,
            sharding="rows" if gang is None else gang.sharding,
            parts=2 if name in self.reduced else 1,
        )
        ranks = self.num_ranks(node)
        if ranks > 1:
            ref = self.session.submit_group(
                run_member, call, name=name, ranks=ranks, cpus=request.cpus, gpus=request.gpus
            )
        else:
            room = {"memory": request.memory_bytes, "disk": request.disk_bytes}
            arguments = (call, None, self.session.device)
            ref = self.session.submit(run_node, *arguments, name=name, cpus=request.cpus, gpus=request.gpus, **room)
        self.pending[ref] = name
        self.emit("submitted", name)

    def request(self, node: Node) -> Request:
        """Return what the node, or each of its ranks, asks for, cut to what is there. Ranks share no GPU."""
        gpu = self.session.gpu()
        alone = self.num_ranks(node) > 1
        wanted = request_of(node, None if gpu is None or alone else gpu[1])
        cpus, gpus = self.session.fit(wanted.cpus, wanted.gpus)
        return replace(wanted, cpus=cpus, gpus=gpus)

    def num_ranks(self, node: Node) -> int:
        """Return how many processes the node runs as: what was asked for, or what its share of the GPUs has room for.

        They share the batch equally. Raises ConfigError if those asked for cannot.
        """
        gang = node.resources.gang
        if gang is None:
            return 1
        if self.ranks is not None:
            if gang.batch % self.ranks:
                raise ConfigError(f"--ranks {self.ranks} does not divide train.batch_size {gang.batch}")
            return self.ranks
        return ranks_for(self.session.gpus, gang.shares, gang.batch)

    def read_messages(self) -> None:
        """Pass on what the running tasks say of themselves."""
        running = {self.graph.key(name): name for name in self.pending.values()}
        for message in self.session.messages():
            name = running.get(message["key"])
            if name is None:
                continue
            if "product" in message:
                self.have(self.graph.nodes[name].byproducts[message["product"]])
            else:
                self.emit("progress", name, message=message["text"], metrics=message["metrics"], step=message["step"])

    def have(self, product: str) -> None:
        """Note that a byproduct is stored."""
        if self.graph.key(product) not in self.stored:
            self.stored.add(self.graph.key(product))
            self.set_state(product, "done")

    def collect(self, ref: Ref) -> None:
        """Take in the end of one task."""
        name = self.pending.pop(ref)
        self.admission.end(name)
        try:
            result: NodeResult = self.session.result(ref)
        except (ArtifactCorrupted, ArtifactMissing) as err:
            if not self.repair(name, err):
                self.fail(name, err)
        except OutOfMemoryError as err:  # of a GPU
            if name in self.reduced:
                self.fail(name, err)
            else:
                self.reduced.add(name)
                self.emit("reduced", name, message=first_line(err))
        except Exception as err:  # whatever a task can raise fails that task and is reported
            self.fail(name, err)
        else:
            self.results[name] = result
            self.stored.add(self.graph.key(name))
            self.set_state(name, "done", result)
            for label in result.byproducts:
                self.have(self.graph.nodes[name].byproducts[label])

    def repair(self, name: str, err: ArtifactCorrupted | ArtifactMissing) -> bool:
        """Discard the damaged input, so that it is built again, and return True; False if that is no way out."""
        if err.key is None or err.key not in {self.graph.key(parent) for parent in self.graph.parents(name)}:
            return False
        if err.key in self.stored:  # otherwise another consumer has found it first
            self.repairs[err.key] += 1
            if self.repairs[err.key] > _MAX_REPAIRS:
                return False
            self.store.discard(err.key)
            self.stored.discard(err.key)
        self.emit("repaired", name, message=str(err))
        return True

    def fail(self, name: str, err: Exception) -> None:
        failure = self.failures[name] = NodeFailure.of(name, self.graph.key(name), err)
        self.set_state(name, "failed", message=failure.error)

    def discard_spent(self) -> None:
        """Remove ephemeral artifacts that no unfinished node of the graph will read."""
        readers = {name for name, state in self.decide_rest().items() if state == "run"} | set(self.pending.values())
        wanted = {self.graph.key(parent) for reader in readers for parent in self.graph.parents(reader)}
        wanted |= {self.graph.key(name) for name in self.kept}
        for name in self.graph.order:
            key = self.graph.key(name)
            if key in self.stored and key not in wanted:
                self.store.discard(key)
                self.stored.discard(key)
                self.emit("discarded", name)

    def decide_rest(self) -> dict[str, State]:
        """Return what a run for the whole graph would do now: this one, and later ones for what was not asked now."""
        return decide(self.graph, self.kept, self.stored, self.failures)

    def finish(self, interrupted: bool) -> RunResult:
        """Return the result; a node that has no state yet was either skipped or never needed."""
        states = decide(self.graph, self.targets, self.stored, self.failures)
        stuck = blocked(self.graph, self.stored, self.failures)
        for name, state in states.items():
            if state in ("run", "yielded") and name not in self.failures:
                assert interrupted or name in stuck, f"{name} could have run"
                self.set_state(name, "skipped")
            else:
                self.states.setdefault(name, "unneeded")
        return RunResult(
            states={name: self.states[name] for name in self.graph.order},
            results=self.results,
            failures=list(self.failures.values()),
            seconds=time.monotonic() - self.start,
            interrupted=interrupted,
        )

    def set_state(
        self,
        name: str,
        state: Literal["done", "cached", "failed", "skipped"],
        result: NodeResult | None = None,
        message: str = "",
    ) -> None:
        self.states[name] = state
        self.emit(state, name, result, message)

    def emit(
        self,
        kind: EventKind,
        name: str,
        result: NodeResult | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
    ) -> None:
        task = self.graph.nodes[name].task.name
        seconds = time.monotonic() - self.start
        self.on_event(Event(kind, name, task, seconds, result, message, metrics or {}, step))


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does. Signals reach the main thread only, so elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
