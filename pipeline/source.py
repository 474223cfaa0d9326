"""Where a model comes from: a local folder, a hub id or a GGUF file, made local and fingerprinted."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefixquant.cluster.downloads import cache_folder
from prefixquant.cluster.remote_folder import RemoteFile, RemoteFolder, is_remote
from prefixquant.pipeline.recipe import ModelConfig
from prefixquant.pipeline.remote_model import RemoteCheckpoint
from prefixquant.tasks.errors import CheckpointError, ConfigError
from prefixquant.tasks.load import LoadedModel, cached_checkpoint, load_model
from prefixquant.tasks.model.checkpoint import Checkpoint

_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Files of a model folder that decide what it computes: weights, config, tokenizer, chat template."""


def resolve_source(model: ModelConfig) -> Path | str:
    """Return the local folder or .gguf file of a model, or its URL; a hub id's files are downloaded if need be.

    Raises:
        CheckpointError: it does not exist, or the hub cannot be reached.
    """
    if is_remote(model.source):
        return model.source.rstrip("/")
    return _resolve_local(model)


def checkpoint_at(path: str, index: dict[str, Any] | None = None) -> Checkpoint:
    """Return the checkpoint at a local path or a URL, opened once a process; `index` as `open_checkpoint` takes it."""
    return _remote_checkpoint(path) if is_remote(path) else cached_checkpoint(path, index)


def model_at(path: str) -> LoadedModel:
    """Return what is known of the model at a local path or a URL; raises as `load_model` does."""
    return load_model(path, _remote_checkpoint(path) if is_remote(path) else None)


def _remote_checkpoint(url: str) -> RemoteCheckpoint:
    return _opened(url, tuple(sorted(RemoteFolder(url).files().items())))


@lru_cache(maxsize=1)
def _opened(url: str, files: tuple[tuple[str, RemoteFile], ...]) -> RemoteCheckpoint:
    return RemoteCheckpoint(url, dict(files))


def _resolve_local(model: ModelConfig) -> Path:
    path = Path(model.source).expanduser()
    if path.exists():
        if model.revision is not None:
            raise ConfigError(f"model.revision is for hub ids; {model.source!r} is a local path, so leave it out")
        return path.absolute()
    if model.source.endswith(".gguf") or model.source[0] in "/.~" or model.source.count("/") != 1:
        raise CheckpointError(
            f"model.source {model.source!r} does not exist; give a model folder, a hub id or a .gguf file"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=list(_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise CheckpointError(
            f"model.source {model.source!r} is no local path and cannot be had from the hub ({reason}); "
            f"check the id, your network and token, or give a local folder"
        ) from err


def source_fingerprint(place: str | Path) -> str:
    """Return the digest of the bytes of a model's files and their names; not of where they lie.

    A file's digest is remembered by path, size and time of change, so that an unchanged model is read once. One at a
    URL is read in passing and not kept.
    """
    if is_remote(place):
        return _remote_fingerprint(str(place))
    path = Path(place)
    files = [path] if path.is_file() else sorted({file for pattern in _PATTERNS for file in path.glob(pattern)})
    if not files:
        raise CheckpointError(f"{path} holds no model files; give a model folder, a hub id or a .gguf file")
    memory = _Memory(cache_folder() / "fingerprints.json")
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(memory.digest, files))
    memory.save()
    named = [
        ("model.gguf" if path.is_file() else file.name, digest) for file, digest in zip(files, digests, strict=True)
    ]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _remote_fingerprint(url: str) -> str:
    folder = RemoteFolder(url)
    files = folder.files()
    names = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in _PATTERNS))
    if not names:
        raise CheckpointError(f"{url} holds no model files; give a Hugging Face model folder")
    memory = _Memory(cache_folder() / "fingerprints.json")

    def digest(name: str) -> str:
        file = files[name]
        return memory.of(f"{url}/{name}:{file.size}:{file.tag}", lambda: _streamed_digest(folder, name))

    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(digest, names))
    memory.save()
    return hashlib.sha256(json.dumps(list(zip(names, digests, strict=True))).encode()).hexdigest()


def _streamed_digest(folder: RemoteFolder, name: str) -> str:
    sha256 = hashlib.sha256()
    for chunk in folder.chunks(name):
        sha256.update(chunk)
    return sha256.hexdigest()


class _Memory:
    """Digests of files seen before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        try:
            self._known = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}  # absent or half-written: everything is read again

    def digest(self, file: Path) -> str:
        """Return the SHA-256 of a file, from memory if size and time of change are the same."""
        status = file.stat()

        def read() -> str:
            with file.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()

        return self.of(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}", read)

    def of(self, identity: str, read: Callable[[], str]) -> str:
        """Return the digest of what has this identity, by `read` if it is new."""
        if identity not in self._known:
            self._known[identity] = read()
        return self._known[identity]

    def save(self) -> None:
        """Write the memory; a cache that cannot be written is only slower the next time."""
        temporary = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):  # the folder itself may be what is wrong
                temporary.unlink(missing_ok=True)
