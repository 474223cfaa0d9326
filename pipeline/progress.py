"""How far a run is, for people: on stderr, because stdout belongs to results."""

import sys
import time
from collections import Counter
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from prefixquant.pipeline.outcome import Event
from prefixquant.pipeline.plan import Plan

_LINE_INTERVAL_S = 1.0  # at most one plain line in this time, failures apart


class Progress(Protocol):
    """Takes the events of one run; a context manager around it."""

    def __call__(self, event: Event) -> None:
        """Show the event."""

    def __enter__(self) -> Self:
        """Start showing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Show what is still to be shown, and leave the terminal as it was."""


def make_progress(quiet: bool, plan: Plan, stream: TextIO | None = None) -> Progress:
    """Return what suits the stream (default: stderr): bars on a terminal, lines elsewhere, only trouble if quiet."""
    stream = stream or sys.stderr
    if quiet:
        return QuietProgress(stream)
    return RichProgress(plan, stream) if stream.isatty() else PlainProgress(plan, stream)


class QuietProgress:
    """One line a failure, a repair or a retry with less memory, nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, event: Event) -> None:
        """Write what went wrong."""
        if event.kind in ("failed", "repaired", "reduced"):
            print(f"[{_clock(event.seconds)}] {_trouble(event)}", file=self.stream, flush=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Do nothing."""


class PlainProgress(QuietProgress):
    """A line when a node ends or says how far it is, at most one a second.

    At the end of a node it says how many of its stage are done and what is left.
    """

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        super().__init__(stream)
        self.remaining = _Remaining(plan)
        self.totals = _totals(plan)
        self.done: Counter[str] = Counter()
        self.held: Event | None = None
        self.written = float("-inf")

    def __call__(self, event: Event) -> None:
        """Count the event; write a line if it is time for one."""
        super().__call__(event)
        if event.kind == "progress" and time.monotonic() - self.written >= _LINE_INTERVAL_S:
            print(f"[{_clock(event.seconds)}] {event.node} {event.message}", file=self.stream, flush=True)
            self.written = time.monotonic()
        if event.kind != "done" or event.result is None:
            return
        self.done[event.task] += 1
        self.remaining.finish(event.node)
        if self.held is not None and self.held.task != event.task:
            self._write(self.held)  # the last word on a stage is never swallowed
        self.held = event
        if time.monotonic() - self.written >= _LINE_INTERVAL_S:
            self._write(event)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Write the line that was held back."""
        if self.held is not None:
            self._write(self.held)

    def _write(self, event: Event) -> None:
        done = self.done[event.task]
        took = f", {event.result.seconds:.1f} s" if event.result else ""
        left = self.remaining.seconds(event.seconds)
        rest = f", about {_clock(left)} left" if left else ""
        count = f"{done}/{max(done, self.totals[event.task])}"
        print(
            f"[{_clock(event.seconds)}] {event.task} {count}: {event.node} done{took}{rest}",
            file=self.stream,
            flush=True,
        )
        self.held, self.written = None, time.monotonic()


class RichProgress:
    """One bar a stage that has something to run, with count and time left."""

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self.totals = _totals(plan)
        self.stages: dict[str, TaskID] = {
            stage: self.bars.add_task(stage, total=total, start=False) for stage, total in self.totals.items()
        }
        self.submitted: Counter[str] = Counter()

    def __call__(self, event: Event) -> None:
        """Move the bar of the event's stage."""
        if event.kind in ("failed", "repaired", "reduced"):
            self.bars.console.print(_trouble(event), markup=False, highlight=False)
        elif event.kind == "submitted":
            self.submitted[event.task] += 1
            if event.task not in self.stages:  # a repair can bring back a stage that had nothing to do
                self.stages[event.task] = self.bars.add_task(event.task, total=0)
            stage = self.stages[event.task]
            self.bars.start_task(stage)
            self.bars.update(stage, total=max(self.totals[event.task], self.submitted[event.task]))
        elif event.kind == "progress":
            self.bars.update(self.stages[event.task], description=f"{escape(event.node)} {event.message}")
        elif event.kind == "done" and event.result is not None:
            self.bars.update(self.stages[event.task], advance=1, description=event.task)

    def __enter__(self) -> Self:
        """Show the bars."""
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the bars as they are and give the terminal back."""
        self.bars.stop()


class _Remaining:
    """Time left, from the share of the work that is done; a node without an estimate weighs as the average does.

    The first tasks are short and say little of the rest, so the estimates count as a tenth of the work done on time.
    """

    def __init__(self, plan: Plan) -> None:
        nodes = [entry.node for entry in plan.entries if entry.state == "run"]
        known = [node.estimate.seconds for node in nodes if node.estimate]
        average = sum(known) / len(known) if known else 1.0
        self.weights = {node.name: node.estimate.seconds if node.estimate else average for node in nodes}
        self.total = sum(self.weights.values())

    def finish(self, node: str) -> None:
        self.weights.pop(node, None)

    def seconds(self, elapsed: float) -> float:
        """Return the seconds left after `elapsed`; 0 when nothing is left."""
        left = sum(self.weights.values())
        prior = 0.1 * self.total
        return left * (elapsed + prior) / (self.total - left + prior) if left else 0.0


def _totals(plan: Plan) -> Counter[str]:
    return Counter(entry.node.task.name for entry in plan.entries if entry.state == "run")


def _trouble(event: Event) -> str:
    if event.kind == "repaired":
        return f"{event.node}: an input is damaged and is built again: {event.message}"
    if event.kind == "reduced":
        return (
            f"{event.node}: the GPU's memory does not suffice; once more with half as much at a time: {event.message}"
        )
    return f"{event.node} failed: {event.message}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
