"""Where a run's loadable model goes: a folder of this machine, or one at a URL, file by file."""

import os
from pathlib import Path

from prefixquant.cluster.errors import ArtifactError
from prefixquant.cluster.remote_folder import RemoteFolder, is_remote
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.materialize import OutputError, check_output, contents, materialize
from prefixquant.tasks.export import DESCRIPTION

UNFINISHED = "prefixquant.unfinished"
"""Lies in a folder at a URL while it is written: there, several files cannot appear at once."""


def check_place(out: str | os.PathLike[str]) -> None:
    """Raise OutputError unless the folder can be made, or is one of ours that may be replaced."""
    if not is_remote(out):
        check_output(Path(out))
        return
    try:
        names = RemoteFolder(os.fspath(out)).files().keys()
    except ArtifactError as err:
        raise OutputError(f"--out: {err}") from err
    if names and not names & {DESCRIPTION, UNFINISHED}:
        raise OutputError(f"--out {out} holds other files; give a new or empty folder")


def write_model(graph: Graph, store: ArtifactStore, out: str | os.PathLike[str], num_blocks: int) -> None:
    """Write the export of a finished run; an earlier export there is replaced.

    A local folder is complete or not written at all. At a URL the description comes last, so that what is not complete
    is no model of ours, and the next run replaces it.

    Raises:
        OutputError: it cannot be written.
        ArtifactError: a stored artifact is missing or damaged.
    """
    if not is_remote(out):
        materialize(graph, store, Path(out), num_blocks)
        return
    check_place(out)
    folder = RemoteFolder(os.fspath(out))
    try:
        folder.write(UNFINISHED, b"")
        before = folder.files().keys()
        if DESCRIPTION in before:
            folder.remove(DESCRIPTION)
        written = {UNFINISHED}
        last: bytes | Path = b""
        for name, content in contents(graph, store, num_blocks):
            if name == DESCRIPTION:
                last = content
            else:
                folder.write(name, content)
            written.add(name)
        for name in before - written:
            folder.remove(name)
        folder.write(DESCRIPTION, last)
        folder.remove(UNFINISHED)
    except OSError as err:
        raise OutputError(f"--out {out} cannot be written ({err}); the run is stored: run again") from err
