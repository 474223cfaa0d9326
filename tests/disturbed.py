"""A recipe run by `prefixquant run` on several nodes, to be disturbed; and what it must come to all the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tiny
from inline import run_inline
from nodes import Nodes

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.recipe import Recipe

COMMAND = str(Path(sys.executable).with_name("prefixquant"))
BLOCKS = 6
SLOW = "search={coarse_points: 60, fine_points: 30, weight_points: 4}"
"""About a second a block."""

Digests = dict[str, dict[str, str]]


def wait_until(condition: Callable[[], Any], seconds: float = 120, shown: Callable[[], Any] = lambda: "") -> Any:
    """Return what the condition gives once that is true; fail after so many seconds, with what `shown` gives."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain: {shown()}"
        time.sleep(0.05)
    return found


def digests(store: ArtifactStore, graph: Any) -> Digests:
    """Return the digests of all files of the artifacts a run leaves, by node."""
    kept = [name for name in graph.order if not graph.nodes[name].task.ephemeral]
    return {name: {file: e.sha256 for file, e in store.manifest(graph.key(name)).files.items()} for name in kept}


def undisturbed(recipe: Recipe, folder: Path) -> tuple[Any, Digests]:
    """Return graph and digests of a run in this process, which nothing disturbs."""
    store = ArtifactStore(str(folder))
    graph, _, _ = run_inline(recipe, store)
    return graph, digests(store, graph)


def write_model(folder: Path) -> None:
    """Write a model of enough blocks for a run to be caught in the middle."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.write_tiny_model(folder, blocks=BLOCKS)


class Driver:
    """`prefixquant run` on a cluster of nodes. A context manager that leaves no process behind."""

    def __init__(self, nodes: Nodes, recipe: Path, store: str, *options: str, **variables: str) -> None:
        command = [COMMAND, "run", str(recipe), "--store", store, "--address", nodes.address, "--json", *options]
        self.process = subprocess.Popen(
            [*command, "--tracking", "off"],
            env=nodes.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill it and what it has started, if that is still there."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def wait(self, seconds: float = 240) -> tuple[int, dict[str, Any], str]:
        """Return exit status, summary (empty if there is none) and stderr once it has ended."""
        stdout, stderr = self.process.communicate(timeout=seconds)
        lines = stdout.splitlines()
        summary = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return self.process.returncode, summary, stderr


def stored_blocks(store: ArtifactStore, graph: Any) -> list[str]:
    """Return the blocks that are stored."""
    return [name for name in graph.order if name.startswith("block[") and store.has(graph.key(name))]
