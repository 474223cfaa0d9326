"""Artifact store on any fsspec URL: data objects first, the manifest last, nothing ever overwritten.

    artifacts/<key[:2]>/<key>/<attempt>/<name>    data objects; every attempt has its own folder, so writers never meet
    artifacts/<key[:2]>/<key>/manifest.json       created exclusively: it is the commit, and the first writer wins
    refs/runs/<run_id>.json                       the only mutable files: which keys a run stands on
    tmp/                                          half-written local files; `gc` sweeps it

Objects are written without a temporary name: until a manifest names them, they do not exist.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from prefixquant.cluster.downloads import file_digest, local_copy
from prefixquant.cluster.errors import (
    ArtifactCorrupted,
    ArtifactError,
    ArtifactMissing,
    BytesAltered,
    CacheFull,
    StoreUnavailable,
    StoreUnreadable,
    StoreUnwritable,
)
from prefixquant.cluster.refusals import holds_secrets, is_altered, is_full, refusal, without_secrets

__all__ = [
    "ArtifactCorrupted",
    "ArtifactError",
    "ArtifactMissing",
    "ArtifactStore",
    "CacheFull",
    "FileEntry",
    "Manifest",
    "StoreUnavailable",
    "StoreUnreadable",
    "StoreUnwritable",
]

MANIFEST = "manifest.json"
_CHUNK_BYTES = 8 * 2**20
_ABSENT = (FileNotFoundError, NotADirectoryError)
_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*")
_OBJECT = re.compile(rf"[0-9a-f]{{32}}/{_NAME.pattern}")
_RUN_ID = re.compile(r"(?!\.)[\w.-]{1,128}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One data object of an artifact."""

    path: str
    """`<attempt>/<name>`, relative to the artifact's folder."""

    size: int
    """Bytes."""

    sha256: str
    """Digest of the bytes, 64 hex characters."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact consists of. Its presence in the store is what makes the artifact exist."""

    key: str
    """64 hex characters, chosen by the caller."""

    files: dict[str, FileEntry]
    """The data objects by name."""

    meta: dict[str, Any]
    """Whatever the publisher wanted to remember; JSON types."""

    @property
    def size(self) -> int:
        """Bytes of the data objects."""
        return sum(entry.size for entry in self.files.values())


class ArtifactStore:
    """A store of immutable artifacts by key and of mutable run records, at a local path or any fsspec URL.

    Opening one touches nothing. It pickles as its URL, so a worker re-opens it where it runs. Endpoint, region and
    credentials of a remote one come from where its client looks for them, the environment for instance, never from the
    URL. Every method raises StoreUnreadable or StoreUnavailable where the store refuses a read or does not answer.
    """

    def __init__(self, url: str) -> None:
        if holds_secrets(os.fspath(url)):
            raise ArtifactError(
                f"the store's URL {without_secrets(os.fspath(url))} holds a user name, a password or a signature, "
                f"which would show in logs; take it out and give credentials by the environment"
            )
        try:
            # The listing cache would hide what other processes have written since (s3fs).
            self.fs, root = url_to_fs(os.fspath(url), use_listings_cache=False)
        except (ValueError, ImportError) as err:
            raise ArtifactError(f"cannot open the artifact store {url!r}: {err}") from err
        self.is_local: bool = "file" in self.fs.protocol
        self.root: str = os.path.abspath(os.path.expanduser(root)) if self.is_local else root.rstrip("/")
        self.url: str = f"file://{self.root}" if self.is_local else str(url).rstrip("/")

    def __reduce__(self) -> tuple[type["ArtifactStore"], tuple[str]]:
        return ArtifactStore, (self.url,)

    def __repr__(self) -> str:
        return f"ArtifactStore({self.url!r})"

    def check_writable(self) -> None:
        """Return if files can be created here, and created exclusively; otherwise raise StoreUnwritable."""
        probe = f"{self.root}/tmp/probe-{uuid.uuid4().hex}"
        try:
            exclusive = self._create(probe, b"probe") and not self._create(probe, b"again")
            self.fs.rm_file(probe)
        except Exception as err:  # clients of remote stores raise their own kinds; whatever came is the reason
            raise self._refusal("write to it", err, writing=True) from err
        if not exclusive:
            raise StoreUnwritable(
                f"the artifact store {self.url} lets a second writer overwrite a file (no conditional create); "
                f"two runs could mix their results: choose another store"
            )

    def has(self, key: str) -> bool:
        """Return whether the artifact is there: manifest readable, every object present with its size."""
        return self._whole(key) is not None

    def manifest(self, key: str) -> Manifest:
        """Return the artifact's manifest. Raises ArtifactMissing, or ArtifactCorrupted if it cannot be parsed."""
        try:
            data = self._read_small(self._manifest_path(key), f"read the manifest of artifact {key}")
        except _ABSENT:
            raise ArtifactMissing(f"no artifact {key} in {self.url}", key) from None
        try:
            raw = json.loads(data)
            files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            inside = all(_NAME.fullmatch(name) and _OBJECT.fullmatch(entry.path) for name, entry in files.items())
            if raw["key"] != key or not inside:
                raise ValueError("it describes another key or objects outside its folder")
            return Manifest(key, files, dict(raw["meta"]))
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            message = f"artifact {key} in {self.url} has an unreadable {MANIFEST} ({err}); discard it and run again"
            raise ArtifactCorrupted(message, key, MANIFEST) from err

    def publish(self, key: str, files: Mapping[str, bytes | memoryview | Path], *, meta: Mapping[str, Any]) -> Manifest:
        """Store the files as artifact `key` and return its manifest; an artifact already there wins and is returned.

        A broken artifact (an object gone or truncated) is replaced. Raises StoreUnwritable, for example when the
        disk is full, and then leaves nothing behind.
        """
        for name, source in files.items():
            if not _NAME.fullmatch(name):
                raise ArtifactError(f"artifact {key}: {name!r} is not a usable file name", key, name)
            if isinstance(source, Path) and not source.is_file():
                raise ArtifactError(f"artifact {key}: there is no file {source} to store as {name!r}", key, name)
        stored_meta = json.loads(json.dumps(dict(meta)))
        if (winner := self._whole(key)) is not None:
            return winner
        attempt = uuid.uuid4().hex
        won = False
        try:
            with self._writing(f"publish artifact {key}"):
                entries = {name: self._write_object(key, attempt, name, source) for name, source in files.items()}
                manifest = Manifest(key, entries, stored_meta)
                data = json.dumps(asdict(manifest), indent=1, sort_keys=True).encode()
                while not (won := self._create(self._manifest_path(key), data)):
                    if (winner := self._whole(key)) is not None:
                        return winner
                    self.discard(key)  # a broken winner would keep every later writer out
            return manifest
        finally:
            # A request that was retried on its way can have won and still report a loss, so the manifest decides.
            if not won:
                with suppress(ArtifactError):  # it would hide why the publish failed; `gc` sweeps what stays
                    if attempt not in (self.attempts(key) or ()):
                        self.remove_path(f"{self._folder(key)}/{attempt}")

    def read(self, key: str, name: str) -> bytes:
        """Return the bytes of one file, verified. Raises ArtifactMissing or ArtifactCorrupted."""
        entry = self._entry(key, name)

        def fetch() -> bytes:
            data = self._cat(f"{self._folder(key)}/{entry.path}", entry.size)
            self._verify(key, name, entry, len(data), hashlib.sha256(data).hexdigest())
            return data

        return self._read_object(key, name, entry, fetch)

    def local_path(self, key: str, name: str) -> Path:
        """Return a verified local file with these bytes: the object itself, or a download kept in a local cache.

        Treat it as read-only. Raises CacheFull as well, if this node's disk has no room for a download.
        """
        entry = self._entry(key, name)
        path = Path(self._folder(key), entry.path)
        if not self.is_local:

            def fetch(part: Path) -> None:
                self._read_object(key, name, entry, lambda: self._fetch(key, name, entry, part))

            return local_copy(entry.sha256, entry.size, Path(name).name, fetch)
        if not path.is_file():
            raise self._corrupted(key, name, entry, "nothing")
        self._verify(key, name, entry, *file_digest(path))
        return path

    def discard(self, key: str) -> None:
        """Remove the artifact: its manifest first, then the objects it names. A missing one is fine.

        Attempts the manifest does not name stay, since they may belong to a writer at work; `gc` sweeps them.
        """
        attempts = self.attempts(key) or set()
        self.remove_path(self._manifest_path(key))
        for attempt in attempts:
            self.remove_path(f"{self._folder(key)}/{attempt}")

    def attempts(self, key: str) -> set[str] | None:
        """Return the attempts the manifest names: empty without a manifest, None if it is unreadable."""
        try:
            return {entry.path.split("/")[0] for entry in self.manifest(key).files.values()}
        except ArtifactMissing:
            return set()
        except ArtifactCorrupted:
            return None

    def keys(self) -> list[str]:
        """Return the keys of all artifacts with a manifest, sorted; their objects are not checked."""
        with self.reading("list its artifacts"):
            tails = [path.split("/")[-2:] for path in self.fs.find(f"{self.root}/artifacts")]
        return sorted(folder for folder, name in tails if name == MANIFEST and _KEY.fullmatch(folder))

    def size(self, key: str) -> int:
        """Return the bytes of the artifact's data objects. Raises as `manifest` does."""
        return self.manifest(key).size

    def write_ref(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Store or replace the record of a run, at once or not at all. Raises StoreUnwritable."""
        path, data = self._ref_path(run_id), json.dumps(dict(record), indent=1).encode()
        with self._writing(f"write the record of run {run_id}"):
            if self.is_local:
                with self._temporary(path, data) as temporary:
                    os.replace(temporary, path)
            else:
                self.fs.pipe_file(path, data)

    def read_ref(self, run_id: str) -> dict[str, Any]:
        """Return the record of a run. Raises ArtifactMissing, or ArtifactCorrupted if it is not a JSON object."""
        try:
            record = json.loads(self._read_small(self._ref_path(run_id), f"read the record of run {run_id}"))
        except _ABSENT:
            raise ArtifactMissing(f"no run {run_id!r} in {self.url}", run_id) from None
        except ValueError as err:
            record, reason = None, str(err)
        else:
            reason = f"it holds a {type(record).__name__}"
        if not isinstance(record, dict):
            raise ArtifactCorrupted(
                f"the record of run {run_id} in {self.url} is not a JSON object ({reason}); delete it: "
                f"{self._ref_path(run_id)}",
                run_id,
            )
        return record

    def run_ids(self) -> list[str]:
        """Return the ids of all runs with a record, sorted."""
        with self.reading("list its runs"):
            paths = self.fs.find(f"{self.root}/refs/runs")
        return sorted(path.split("/")[-1].removesuffix(".json") for path in paths)

    def delete_ref(self, run_id: str) -> None:
        """Forget a run; its artifacts stay until `gc`. A missing one is fine."""
        self.remove_path(self._ref_path(run_id))

    def remove_path(self, path: str) -> None:
        """Remove a file or folder inside the store by its full path. A missing one is fine. Raises StoreUnwritable."""
        with self._writing(f"remove {path}"), suppress(*_ABSENT):
            self.fs.rm(path, recursive=True)

    # Paths

    def _folder(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise ArtifactError(f"an artifact key is 64 lower-case hex characters, got {key!r}", key)
        return f"{self.root}/artifacts/{key[:2]}/{key}"

    def _manifest_path(self, key: str) -> str:
        return f"{self._folder(key)}/{MANIFEST}"

    def _ref_path(self, run_id: str) -> str:
        if not _RUN_ID.fullmatch(run_id):
            raise ArtifactError(f"a run id is 1 to 128 letters, digits, '.', '_' or '-', got {run_id!r}", run_id)
        return f"{self.root}/refs/runs/{run_id}.json"

    # Reading

    def _entry(self, key: str, name: str) -> FileEntry:
        files = self.manifest(key).files
        if name not in files:
            raise ArtifactMissing(f"artifact {key} holds no file {name!r}; it holds {sorted(files)}", key, name)
        return files[name]

    def _whole(self, key: str) -> Manifest | None:
        """Return the manifest if every object it names is there with its size, otherwise None."""
        folder = self._folder(key)
        try:
            manifest = self.manifest(key)
            with self.reading(f"look at the objects of artifact {key}"):
                sizes_fit = [self.fs.info(f"{folder}/{e.path}")["size"] == e.size for e in manifest.files.values()]
            return manifest if all(sizes_fit) else None
        except (ArtifactMissing, ArtifactCorrupted, *_ABSENT):
            return None

    def _verify(self, key: str, name: str, entry: FileEntry, size: int, sha256: str) -> None:
        if (size, sha256) != (entry.size, entry.sha256):
            raise self._corrupted(key, name, entry, f"{size} bytes with sha256 {sha256}")

    def _corrupted(self, key: str, name: str, entry: FileEntry, found: str) -> ArtifactCorrupted:
        return ArtifactCorrupted(
            f"artifact {key}, file {name!r} ({self._folder(key)}/{entry.path}): expected {entry.size} bytes "
            f"with sha256 {entry.sha256}, found {found}; discard this artifact and run again",
            key,
            name,
        )

    def _cat(self, path: str, size: int = 0) -> bytes:
        """Return a file's bytes. s3fs would ask for a small one's size first, which takes longer than to read it."""
        at_once = {"max_concurrency": 1} if "s3" in self.fs.protocol and size <= _CHUNK_BYTES else {}
        return self.fs.cat_file(path, **at_once)

    def _read_small(self, path: str, action: str) -> bytes:
        """Return the bytes of a small file, fetched once more if they changed on their way."""
        for attempt in (1, 2):
            try:
                with self.reading(action):
                    return self._cat(path)
            except BytesAltered:
                if attempt == 2:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _read_object(self, key: str, name: str, entry: FileEntry, fetch: Callable[[], bytes | None]) -> Any:
        """Return what `fetch` returns. Bytes that a network brought and that are wrong are fetched once more."""
        for attempt in (1, 2):
            try:
                with self.reading(f"read file {name!r} of artifact {key}"):
                    return fetch()
            except FileNotFoundError:
                raise self._corrupted(key, name, entry, "nothing") from None
            except BytesAltered as err:
                if attempt == 2:
                    raise self._corrupted(key, name, entry, "others, as the checksum of the transfer says") from err
            except ArtifactCorrupted:
                if self.is_local or attempt == 2:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _fetch(self, key: str, name: str, entry: FileEntry, part: Path) -> None:
        self.fs.get_file(f"{self._folder(key)}/{entry.path}", str(part))
        self._verify(key, name, entry, *file_digest(part))

    # Writing

    def _write_object(self, key: str, attempt: str, name: str, source: bytes | memoryview | Path) -> FileEntry:
        path = f"{self._folder(key)}/{attempt}/{name}"
        if self.is_local:  # elsewhere folders need no making, and s3fs would go as far as making the bucket
            os.makedirs(os.path.dirname(path), exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with self.fs.open(path, "wb") as out:
            for chunk in _chunks(source):
                digest.update(chunk)
                size += len(chunk)
                out.write(chunk)
        return FileEntry(f"{attempt}/{name}", size, digest.hexdigest())

    def _create(self, path: str, data: bytes) -> bool:
        """Create the file whole and return True, or return False because it exists."""
        if not self.is_local:
            try:
                self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)  # atomic and exclusive; a rename would overwrite
            except FileExistsError:
                return False
            return True

    @contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[str]:
        """Yield a synced temporary file with the data, ready to become `path`; removed at the end if still there."""
        temporary = f"{self.root}/tmp/{uuid.uuid4().hex}"
        for folder in (f"{self.root}/tmp", os.path.dirname(path)):
            os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            yield temporary
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    @contextmanager
    def _writing(self, action: str) -> Iterator[None]:
        """Turn a refusal of the file system into StoreUnwritable or StoreUnavailable."""
        try:
            yield
        except ArtifactError:
            raise
        except Exception as err:
            raise self._refusal(action, err, writing=True) from err

    @contextmanager
    def reading(self, action: str) -> Iterator[None]:
        """Turn a refusal of the file system into StoreUnreadable or StoreUnavailable; absence stays what it is."""
        try:
            yield
        except (ArtifactError, *_ABSENT):
            raise
        except Exception as err:
            if is_full(err):  # of the disk that gets a download
                raise
            if is_altered(err):
                raise BytesAltered(f"artifact store {self.url}: cannot {action}: bytes changed on their way") from err
            raise self._refusal(action, err, writing=False) from err

    def _refusal(self, action: str, err: Exception, *, writing: bool) -> ArtifactError:
        root = self.root if self.is_local else None
        return refusal(f"artifact store {self.url}", action, err, writing=writing, local_root=root)


def _chunks(source: bytes | memoryview | Path) -> Iterator[bytes | memoryview]:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield from _read_chunks(stream)
    else:
        view = memoryview(source).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


def _read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
