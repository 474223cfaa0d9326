"""Turn a stored export into a folder: its shards are the stored artifacts, copied and verified one at a time."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import RECORD, TENSORS
from prefixquant.pipeline.graph import Graph
from prefixquant.pipeline.stage_profiles import EXPORT_PROFILE
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


Contents = Iterator[tuple[str, Path]]
"""Names of files in a folder, perhaps in folders of it, and the verified local files that they are copies of."""


def contents(graph: Graph, store: ArtifactStore, num_blocks: int) -> Contents:
    """Give the files of a finished run's export, and those of its profiles in folders named after them."""
    blocks = graph.nodes["export"].inputs["blocks"]
    inputs: dict[str, str | tuple[str, ...]] = {
        "blocks": tuple(graph.key(blocks[block]) for block in range(num_blocks)),
        "ends": graph.key("rotate[ends]"),
        "prefix": graph.key("prefix"),
    }
    yield from exported(store, graph.key("export"), inputs)
    for name, node in graph.nodes.items():
        if node.task is EXPORT_PROFILE:
            yield from ((f"{node.config.profile}/{file}", path) for file, path in _files(store, graph.key(name)))


def exported(store: ArtifactStore, export_key: str, inputs: Mapping[str, str | tuple[str, ...]]) -> Contents:
    """Give the files of a stored export; `inputs`: keys of the artifacts it describes, by argument.

    Raises:
        ArtifactError: a stored artifact is missing or damaged.
    """
    yield from _files(store, export_key)
    shards = {block_file(block): key for block, key in enumerate(inputs["blocks"])}
    shards[ENDS_FILE] = str(inputs["ends"])
    prefix = str(inputs["prefix"])
    if TENSORS in store.manifest(prefix).files:
        shards[PREFIX_FILE] = prefix
    for name, key in shards.items():
        yield name, store.local_path(key, TENSORS)


def _files(store: ArtifactStore, key: str) -> Contents:
    """Give an artifact's files, its record aside."""
    for name in store.manifest(key).files:
        if name != RECORD:
            yield name, store.local_path(key, name)


def copy_to(folder: Path, files: Contents) -> None:
    """Copy files into a folder that exists."""
    for name, path in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def materialize(graph: Graph, store: ArtifactStore, folder: Path, num_blocks: int) -> None:
    """Write the export of a finished run to a folder, complete or not at all; an earlier export there is replaced.

    Raises:
        OutputError: it cannot be written.
        ArtifactError: a stored artifact is missing or damaged.
    """
    with new_folder(folder) as temporary:
        copy_to(temporary, contents(graph, store, num_blocks))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to write to, which then takes its place; after an error it is gone.

    Raises:
        OutputError: it cannot be written, or would replace what is not ours.
    """
    check_output(folder)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield temporary
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
