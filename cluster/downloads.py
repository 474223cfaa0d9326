"""Local copies of a remote store's objects, by digest. They make room for each other when their disk is full."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefixquant.cluster.errors import CacheFull
from prefixquant.cluster.refusals import is_full


def cache_folder() -> Path:
    """Return where local copies are kept: $PREFIXQUANT_CACHE, by default ~/.cache/prefixquant."""
    return Path(os.environ.get("PREFIXQUANT_CACHE") or "~/.cache/prefixquant").expanduser()


def file_digest(path: Path) -> tuple[int, str]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), sha256


def local_copy(sha256: str, size: int, name: str, fetch: Callable[[Path], None]) -> Path:
    """Return a file of this digest, checked; `fetch(path)` downloads and checks it if there is none.

    Raises:
        CacheFull: the disk has no room for it, also without the other copies.
    """
    objects = cache_folder() / "objects"
    path = objects / sha256[:2] / sha256 / name
    if path.is_file() and file_digest(path) == (size, sha256):
        with suppress(OSError):
            os.utime(path)  # the copies used last are the last to go
        return path
    part = path.with_name(f"{name}.part-{uuid.uuid4().hex}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(part)
        except OSError as err:
            if not is_full(err):
                raise
            part.unlink(missing_ok=True)
            _make_room(objects, size)
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(part)
        os.replace(part, path)
    except OSError as err:
        if not is_full(err):
            raise
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        raise CacheFull(
            f"{cache_folder()} has no room for a local copy of {name!r}, {size} bytes: {free} are free; "
            f"set PREFIXQUANT_CACHE to a folder on a larger disk of this node"
        ) from err
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def _make_room(objects: Path, size: int) -> None:
    """Remove copies, those used longest ago first, until `size` bytes are free. One in use lives on until closed."""
    copies = []
    for path in objects.glob("*/*/*"):
        with suppress(FileNotFoundError):  # another task made room as well
            copies.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(each for each in copies if ".part-" not in each[1].name):
        if shutil.disk_usage(objects).free >= size:
            return
        path.unlink(missing_ok=True)
