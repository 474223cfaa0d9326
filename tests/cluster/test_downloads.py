"""Local copies on a disk that is too small for all of them, or for any."""

import hashlib
import os
import subprocess

import pytest

from prefixquant.cluster.downloads import local_copy
from prefixquant.cluster.errors import CacheFull
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.artifacts import load_artifact, publish_artifact
from prefixquant.tasks.artifact import Artifact

KILOBYTES = 1024


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache on a disk of its own, of a megabyte."""
    folder = tmp_path / "cache"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={KILOBYTES}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    monkeypatch.setenv("PREFIXQUANT_CACHE", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def copy(data):
    return local_copy(hashlib.sha256(data).hexdigest(), len(data), "tensors", lambda path: path.write_bytes(data))


def copies(cache):
    return {path.read_bytes()[:1] for path in cache.glob("objects/*/*/*")}


def test_copies_make_room_for_a_new_one_and_the_last_used_stay(cache):
    third = bytes(300 * KILOBYTES)
    for letter in (b"a", b"b", b"c"):
        copy(letter + third)
    os.utime(copy(b"a" + third))  # used again
    assert copy(b"d" + third).read_bytes() == b"d" + third
    assert copies(cache) == {b"a", b"c", b"d"}


def test_a_copy_in_use_outlives_its_removal(cache):
    half = bytes(600 * KILOBYTES)
    with copy(b"a" + half).open("rb") as used:
        with pytest.raises(CacheFull, match="PREFIXQUANT_CACHE"):
            copy(b"b" + half)  # the space of a file in use comes back when it is closed
        assert used.read() == b"a" + half
    assert copy(b"b" + half).read_bytes() == b"b" + half


def test_what_does_not_fit_leaves_nothing_and_is_read_into_memory(cache):
    import torch

    with pytest.raises(CacheFull, match=r"no room for a local copy of 'tensors', \d+ bytes: \d+ are free"):
        copy(bytes(2048 * KILOBYTES))
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    store = ArtifactStore("memory://full-disk")
    key = hashlib.sha256(b"key").hexdigest()
    tensors = {"x": torch.arange(500_000.0), "y": torch.ones(3, dtype=torch.bfloat16)}
    publish_artifact(store, key, Artifact(tensors), {})
    found = load_artifact(store, key).tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found.keys() == tensors.keys()
