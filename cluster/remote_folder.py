"""A folder at a URL whose files are read whole, in ranges or in passing, and written whole."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsspec.core import url_to_fs

from prefixquant.cluster.errors import ArtifactError, StoreUnavailable
from prefixquant.cluster.refusals import holds_secrets, refusal, without_secrets

_CHUNK_BYTES = 32 * 2**20


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Return whether a place is a URL rather than a path of this machine."""
    return "://" in os.fspath(place) and not os.fspath(place).startswith("file://")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What a listing says of a file."""

    size: int
    """Bytes."""

    tag: str
    """Changes when the file does."""


class RemoteFolder:
    """The files directly in a folder at any fsspec URL. Endpoint, region and credentials come from the environment.

    Every method raises FileNotFoundError for a file that is not there, and StoreUnreadable, StoreUnwritable or
    StoreUnavailable where the server refuses or does not answer.
    """

    def __init__(self, url: str) -> None:
        if holds_secrets(url):
            raise ArtifactError(
                f"{without_secrets(url)} holds a user name, a password or a signature, which would show in logs; "
                f"take it out and give credentials by the environment"
            )
        self.url = url.rstrip("/")
        try:
            self._fs, root = url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as err:
            raise ArtifactError(f"cannot open {url!r}: {err}") from err
        self._root = root.rstrip("/")

    def files(self) -> dict[str, RemoteFile]:
        """Return the files by name; none if there is no such folder."""
        with self._doing("list it"):
            try:
                found = self._fs.ls(self._root, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {
            each["name"].rpartition("/")[2]: RemoteFile(each["size"], _tag(each))
            for each in found
            if each["type"] == "file" and each["name"] != self._root
        }

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes of a file, or those from `start` to `stop`."""
        with self._doing(f"read {name}"):
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop)
        return data

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return the bytes of (name, start, stop) each, asked for at the same time; neighbours in one request."""
        spans: list[tuple[str, int, int]] = []
        for name, start, stop in sorted(each for each in ranges if each[1] < each[2]):
            if spans and spans[-1][0] == name and spans[-1][2] == start:
                spans[-1] = (name, spans[-1][1], stop)
            else:
                spans.append((name, start, stop))
        if not spans:
            return [b"" for _ in ranges]
        paths = [f"{self._root}/{name}" for name, _, _ in spans]
        starts, stops = [start for _, start, _ in spans], [stop for _, _, stop in spans]
        with self._doing(f"read {spans[0][0]}"):
            found: list[bytes] = self._fs.cat_ranges(paths, starts, stops, on_error="raise")
        for (name, start, stop), data in zip(spans, found, strict=True):
            if len(data) != stop - start:
                raise StoreUnavailable(f"{self.url}/{name}: wanted bytes {start} to {stop}, got {len(data)}; run again")
        return [_cut(each, spans, found) for each in ranges]

    def chunks(self, name: str) -> Iterator[bytes]:
        """Give a file's bytes in order, a part at a time."""
        with (
            self._doing(f"read {name}"),
            self._fs.open(f"{self._root}/{name}", "rb", block_size=_CHUNK_BYTES, cache_type="readahead") as file,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def download(self, name: str, path: Path) -> None:
        """Write a file to a local path."""
        with self._doing(f"read {name}"):
            self._fs.get_file(f"{self._root}/{name}", str(path))

    def write(self, name: str, content: bytes | Path) -> None:
        """Put a file there, whole or not at all; one that is there is replaced."""
        with self._doing(f"write {name}", writing=True):
            if isinstance(content, Path):
                self._fs.put_file(str(content), f"{self._root}/{name}")
            else:
                self._fs.pipe_file(f"{self._root}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self._doing(f"remove {name}", writing=True):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _doing(self, action: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except (ArtifactError, FileNotFoundError, GeneratorExit):
            raise
        except Exception as err:
            raise refusal(self.url, action, err, writing=writing) from err


def _cut(wanted: tuple[str, int, int], spans: Sequence[tuple[str, int, int]], found: Sequence[bytes]) -> bytes:
    """Return a range's part of the span that covers it."""
    name, start, stop = wanted
    for (other, first, last), data in zip(spans, found, strict=True):
        if other == name and first <= start and stop <= last:
            return data[start - first : stop - first]
    return b""


def _tag(info: dict[str, object]) -> str:
    return str(info.get("ETag") or info.get("LastModified") or info.get("created") or info.get("mtime") or "")
