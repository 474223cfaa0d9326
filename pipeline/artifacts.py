"""Between artifacts in memory and files in the store: safetensors and JSON, no pickle."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from prefixquant.cluster.errors import ArtifactMissing, CacheFull, StoreUnwritable
from prefixquant.cluster.store import ArtifactStore, Manifest
from prefixquant.tasks.artifact import Artifact
from prefixquant.tasks.errors import PrefixQuantError

TENSORS = "tensors.safetensors"
RECORD = "record.json"
_LARGE_BYTES = 64 * 2**20


class ArtifactFormatError(PrefixQuantError):
    """A task returned something that cannot be stored: a record that is not JSON, or a file under a reserved name."""


def encode(artifact: Artifact) -> dict[str, bytes]:
    """Return the artifact's files by name, tensors on CPU and contiguous. Raises ArtifactFormatError."""
    files = _small_files(artifact)
    if artifact.tensors:
        files[TENSORS] = save(_storable(artifact.tensors))
    return files


def publish_artifact(store: ArtifactStore, key: str, artifact: Artifact, meta: Mapping[str, Any]) -> Manifest:
    """Store the artifact under `key` and return the manifest. Raises ArtifactFormatError and what `publish` raises."""
    if sum(tensor.nbytes for tensor in artifact.tensors.values()) < _LARGE_BYTES:
        return store.publish(key, {**artifact.large_files, **encode(artifact)}, meta=meta)
    # Large ones go through a file: in memory they would be there twice.
    with _unwritable(store), scratch_folder(store) as folder:
        path = folder / TENSORS
        save_file(_storable(artifact.tensors), path)
        return store.publish(key, {**artifact.large_files, **_small_files(artifact), TENSORS: path}, meta=meta)


@contextmanager
def scratch_folder(store: ArtifactStore) -> Iterator[Path]:
    """Give a folder for large files; in a local store's own folder for such, where gc finds what a killed task left
    and a full disk is the store's."""
    parent = Path(store.root, "tmp") if store.is_local else None
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="large-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def _unwritable(store: ArtifactStore) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as err:
        raise StoreUnwritable(f"{store.url} cannot be written ({err}); free space or choose another store") from err


def load_artifact(store: ArtifactStore, key: str) -> Artifact:
    """Return the artifact, verified, tensors on CPU. Raises ArtifactMissing or ArtifactCorrupted."""
    names = store.manifest(key).files
    return Artifact(
        tensors=_load_tensors(store, key) if TENSORS in names else {},
        record=json.loads(store.read(key, RECORD)),
        files={name: store.read(key, name) for name in names if name not in (TENSORS, RECORD)},
    )


def _load_tensors(store: ArtifactStore, key: str) -> dict[str, Tensor]:
    try:
        path = store.local_path(key, TENSORS)
    except CacheFull:  # a node whose disk is full goes on, at the price of memory
        return _load_from_memory(store.read(key, TENSORS))
    try:
        return load_file(path)
    except (OSError, RuntimeError, SafetensorError) as err:
        if path.exists():
            raise
        raise ArtifactMissing(f"artifact {key} was removed while it was read", key, TENSORS) from err


def _load_from_memory(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, placed in memory as the file itself would be.

    Matrix products differ in their last bits with the alignment of their operands, and `safetensors.torch.load` puts
    every tensor where Python happens to have room.
    """
    if not hasattr(os, "memfd_create"):
        return load(data)
    with open(os.memfd_create(TENSORS), "wb") as file:
        file.write(data)
        file.flush()
        return load_file(f"/proc/self/fd/{file.fileno()}")


def load_record(store: ArtifactStore, key: str) -> dict[str, Any]:
    """Return the artifact's record, verified, without its tensors. Raises ArtifactMissing or ArtifactCorrupted."""
    record: dict[str, Any] = json.loads(store.read(key, RECORD))
    return record


def _small_files(artifact: Artifact) -> dict[str, bytes]:
    for name in (TENSORS, RECORD):
        if name in artifact.files or name in artifact.large_files:
            raise ArtifactFormatError(f"an artifact's file cannot be called {name!r}, which is a reserved name")
    try:
        record = json.dumps(artifact.record, allow_nan=False, indent=1)
    except (TypeError, ValueError) as err:
        raise ArtifactFormatError(f"an artifact's record must be finite JSON types: {err}") from err
    return {**artifact.files, RECORD: record.encode()}


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    storable: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()  # safetensors refuses tensors that share memory
        storages.add(plain.untyped_storage().data_ptr())
        storable[name] = plain
    return storable
