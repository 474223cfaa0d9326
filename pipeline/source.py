"""Where a model comes from: a local folder, a hub id or a GGUF file, made local and fingerprinted."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from prefixquant.cluster.downloads import cache_folder
from prefixquant.pipeline.recipe import ModelConfig
from prefixquant.tasks.errors import CheckpointError, ConfigError

_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Files of a model folder that decide what it computes: weights, config, tokenizer, chat template."""


def resolve_source(model: ModelConfig) -> Path:
    """Return the local folder or .gguf file of a model, downloading a hub id's files if they are not cached.

    Raises:
        CheckpointError: it does not exist, or the hub cannot be reached.
    """
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


def source_fingerprint(path: Path) -> str:
    """Return the digest of the bytes of a model's files and their names; not of where they lie.

    A file's digest is remembered by path, size and time of change, so that an unchanged model is read once.
    """
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
        identity = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        if identity not in self._known:
            with file.open("rb") as handle:
                self._known[identity] = hashlib.file_digest(handle, "sha256").hexdigest()
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
