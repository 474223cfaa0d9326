"""Turn a stored export into a folder: its shards are the stored artifacts, copied and verified one at a time."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import RECORD, TENSORS
from prefixquant.pipeline.graph import Graph
from prefixquant.tasks.errors import PrefixQuantError
from prefixquant.tasks.export import DESCRIPTION, ENDS_FILE, PREFIX_FILE, block_file


class OutputError(PrefixQuantError):
    """The output folder cannot be written."""


def check_output(folder: Path) -> None:
    """Raise OutputError unless the folder can be made, or is one of ours that may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise OutputError(f"--out {folder} holds other files; give a new or empty folder")


def contents(graph: Graph, store: ArtifactStore, num_blocks: int) -> Iterator[tuple[str, bytes | Path]]:
    """Give the files of the export of a finished run: small ones as bytes, shards as verified local files."""
    export_key, prefix_key = graph.key("export"), graph.key("prefix")
    for name in store.manifest(export_key).files:
        if name != RECORD:
            yield name, store.read(export_key, name)
    blocks = graph.nodes["export"].inputs["blocks"]
    shards = {block_file(block): graph.key(blocks[block]) for block in range(num_blocks)}
    shards[ENDS_FILE] = graph.key("rotate[ends]")
    if TENSORS in store.manifest(prefix_key).files:
        shards[PREFIX_FILE] = prefix_key
    for name, key in shards.items():
        yield name, store.local_path(key, TENSORS)


def materialize(graph: Graph, store: ArtifactStore, folder: Path, num_blocks: int) -> None:
    """Write the export of a finished run to a folder, complete or not at all; an earlier export there is replaced.

    Raises:
        OutputError: it cannot be written.
        ArtifactError: a stored artifact is missing or damaged.
    """
    check_output(folder)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, content in contents(graph, store, num_blocks):
                if isinstance(content, Path):
                    shutil.copyfile(content, temporary / name)
                else:
                    (temporary / name).write_bytes(content)
            temporary.chmod(0o755)
            _replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as err:
        raise OutputError(
            f"--out {folder} cannot be written ({err.strerror or err}); the run is stored: free space or choose "
            f"another folder and run again"
        ) from err


def _replace(temporary: Path, folder: Path) -> None:
    if folder.exists():
        old = temporary.with_name(temporary.name + "-old")
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, folder)
