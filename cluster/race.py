"""Let writers race on the same keys of a store while readers watch, and count what came of it.

    python -m prefixquant.cluster.race s3://BUCKET/PREFIX --writers 8 --keys 200

shows whether a server keeps the promises a store needs: one winner a key, and nobody ever sees half an artifact. It
works below a prefix of its own and removes it at the end. Exit status 1 if a promise was broken.
"""

import argparse
import hashlib
import multiprocessing
import sys
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier, Event
from queue import Empty
from typing import Any

from prefixquant.cluster.errors import ArtifactCorrupted, ArtifactMissing
from prefixquant.cluster.store import ArtifactStore

_NAMES = ("tensors.safetensors", "record.json")
_START_TIMEOUT_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class RaceResult:
    """What came of a race."""

    writers: int
    keys: int
    readers: int

    published: int
    """Calls of `publish` that returned."""

    contested: int
    """Keys that more than one writer found absent and wrote objects for."""

    lost: int
    """Keys without a whole artifact at the end. Must be 0."""

    torn: int
    """Artifacts, at the end or in passing, whose files are damaged, or not all of one writer. Must be 0."""

    changed: int
    """Artifacts that were another writer's when they were read again. Must be 0."""

    misinformed: int
    """Calls of `publish` that returned a manifest other than the final one. Must be 0."""

    leftovers: int
    """Objects that no manifest names, at the end; `gc` would remove them."""

    reads: int
    """Whole artifacts that the readers have read and verified during the race."""

    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not (self.lost or self.torn or self.changed or self.misinformed)


def race(url: str, *, writers: int, keys: int, size: int, readers: int = 2) -> RaceResult:
    """Let `writers` processes publish the same `keys` keys at the same moments, with `size` bytes of their own each."""
    context = multiprocessing.get_context("spawn")  # clients of remote stores do not survive a fork
    store = ArtifactStore(f"{url.rstrip('/')}/race-{uuid.uuid4().hex[:12]}")
    names = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(keys)]
    start, over = context.Barrier(writers + readers + 1), context.Event()
    together = context.Barrier(writers)
    queue: Any = context.Queue()
    crew = [
        context.Process(target=_write, args=(store.url, names, number, size, start, together, queue))
        for number in range(writers)
    ] + [context.Process(target=_watch, args=(store.url, names, start, over, queue)) for _ in range(readers)]
    try:
        for each in crew:
            each.start()
        start.wait(_START_TIMEOUT_S)
        began = time.perf_counter()
        written = [_next(queue, crew) for _ in range(writers)]
        seconds = time.perf_counter() - began
        over.set()
        watched = [_next(queue, crew) for _ in range(readers)]
        for each in crew:
            each.join()
        final = {key: _winner(store, key) for key in names}
        named = sum(len(store.manifest(key).files) + 1 for key, winner in final.items() if winner is not None)
        attempts: Counter[str] = Counter(key for each in written for key in each["wrote"])
        return RaceResult(
            writers=writers,
            keys=keys,
            readers=readers,
            published=sum(len(each["told"]) for each in written),
            contested=sum(count > 1 for count in attempts.values()),
            lost=sum(winner is None for winner in final.values()),
            torn=sum(each["torn"] for each in watched) + sum(winner == -1 for winner in final.values()),
            changed=sum(final[key] != winner for each in watched for key, winner in each["seen"].items()),
            misinformed=sum(final[key] != winner for each in written for key, winner in each["told"].items()),
            leftovers=len(store.fs.find(store.root)) - named,
            reads=sum(each["reads"] for each in watched),
            seconds=seconds,
        )
    finally:
        for each in crew:
            if each.is_alive():
                each.terminate()
        store.remove_path(store.root)


def _next(queue: Any, crew: list[Any]) -> dict[str, Any]:
    """Return the next report; RuntimeError if a process has died without one."""
    while True:
        try:
            return queue.get(timeout=1.0)
        except Empty as err:
            dead = [each.name for each in crew if each.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"{', '.join(dead)} of the race died; see its traceback above") from err


def _content(writer: int, size: int) -> dict[str, bytes]:
    return {name: f"{writer:04}".encode() * (size // 4) for name in _NAMES}


def _write(url: str, keys: list[str], writer: int, size: int, start: Barrier, together: Barrier, queue: Any) -> None:
    store, content = ArtifactStore(url), _content(writer, size)
    told: dict[str, int] = {}
    wrote: list[str] = []
    create = store._create

    def observed(path: str, data: bytes) -> bool:  # a writer that comes to the manifest has written its objects
        wrote.append(path.split("/")[-2])
        return create(path, data)

    store._create = observed  # type: ignore[method-assign]
    start.wait(_START_TIMEOUT_S)
    for key in keys:
        together.wait()
        told[key] = store.publish(key, content, meta={"writer": writer}).meta["writer"]
    queue.put({"told": told, "wrote": sorted(set(wrote))})


def _watch(url: str, keys: list[str], start: Barrier, over: Event, queue: Any) -> None:
    store = ArtifactStore(url)
    seen: dict[str, int] = {}
    reads = torn = 0
    start.wait(_START_TIMEOUT_S)
    while not over.is_set():
        for key in keys:
            winner = _winner(store, key)
            if winner is None:
                break  # the writers have not come so far
            reads += 1
            torn += winner == -1 or seen.setdefault(key, winner) != winner
        time.sleep(_POLL_S)
    queue.put({"seen": seen, "reads": reads, "torn": torn})


def _winner(store: ArtifactStore, key: str) -> int | None:
    """Return whose artifact it is: None if there is none, -1 if it is not whole or of several."""
    try:
        writer: int = store.manifest(key).meta["writer"]
        data = {name: store.read(key, name) for name in _NAMES}
    except ArtifactMissing:
        return None
    except ArtifactCorrupted:
        return -1
    return writer if data == _content(writer, len(data[_NAMES[0]])) else -1


def main() -> None:
    """Run a race and print what came of it."""
    parser = argparse.ArgumentParser(description="Let writers race on the same keys of a store.")
    parser.add_argument("url", help="folder or URL; a prefix of its own is made below it, and removed")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--size", type=int, default=65536, help="bytes of each of the two files of an artifact")
    given = parser.parse_args()
    result = race(given.url, writers=given.writers, keys=given.keys, size=given.size, readers=given.readers)
    for name, value in asdict(result).items():
        print(f"{name:12} {value:.1f}" if isinstance(value, float) else f"{name:12} {value}")
    print("every promise was kept" if result.ok else "a promise was BROKEN: this server cannot hold a store")
    sys.exit(0 if result.ok else 1)


if __name__ == "__main__":
    main()
