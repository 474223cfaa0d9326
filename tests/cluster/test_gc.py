import hashlib
import os
import subprocess
import sys
import time
import uuid

import pytest

from prefixquant.cluster.errors import ArtifactCorrupted
from prefixquant.cluster.gc import GcReport, collect_garbage
from prefixquant.cluster.store import ArtifactStore

KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(5)]
HOUR_S = 3600.0


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    url = str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return ArtifactStore(url)


def files_of(store: ArtifactStore) -> set[str]:
    return {path.removeprefix(f"{store.root}/") for path in store.fs.find(store.root)}


def write(store: ArtifactStore, path: str, data: bytes) -> str:
    full = f"{store.root}/{path}"
    store.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
    store.fs.pipe_file(full, data)
    return full


def orphan_path(key: str) -> str:
    return f"artifacts/{key[:2]}/{key}/{uuid.uuid4().hex}/tensors"


def test_gc_keeps_exactly_what_runs_refer_to(store):
    for key in KEYS:
        store.publish(key, {"a": b"12345", "nested/b": b"678"}, meta={})
    store.write_ref("one", {"keys": {"load": KEYS[0], "prefix": KEYS[1]}})
    store.write_ref("two", {"keys": {"load": KEYS[0], "gone": hashlib.sha256(b"never stored").hexdigest()}})
    store.write_ref("three", {})
    report = collect_garbage(store, min_age_s=0, dry_run=False)
    assert set(report.kept_keys) == set(store.keys()) == set(KEYS[:2])
    assert set(report.removed_keys) == set(KEYS[2:])
    assert report.removed_objects == ()
    assert store.run_ids() == ["one", "three", "two"]
    assert not any(key in path for key in KEYS[2:] for path in files_of(store))
    assert store.read(KEYS[0], "nested/b") == b"678"


def test_gc_removes_orphans_and_temporary_files_but_nothing_of_a_live_artifact(store):
    store.publish(KEYS[0], {"a": b"1"}, meta={})
    store.write_ref("one", {"keys": {"load": KEYS[0]}})
    kept = files_of(store)
    orphans = {
        write(store, orphan_path(KEYS[0]), b"a loser of a race"),
        write(store, orphan_path(KEYS[1]), b"a writer that died"),
        write(store, f"tmp/{uuid.uuid4().hex}", b"half a manifest"),
    }
    write(store, "mlflow.db", b"a neighbour")
    report = collect_garbage(store, min_age_s=0, dry_run=False)
    assert set(report.removed_objects) == orphans
    assert report.freed_bytes == len(b"a loser of a race" + b"a writer that died" + b"half a manifest")
    assert files_of(store) == kept | {"mlflow.db"}


def test_gc_touches_nothing_young(store):
    store.publish(KEYS[0], {"a": b"1"}, meta={})
    write(store, orphan_path(KEYS[1]), b"being written")
    write(store, f"tmp/{uuid.uuid4().hex}", b"being written")
    before = files_of(store)
    assert collect_garbage(store, min_age_s=HOUR_S, dry_run=False) == GcReport((), (), 0, (KEYS[0],))
    assert files_of(store) == before


def test_gc_judges_an_attempt_by_its_newest_object(tmp_path):
    store = ArtifactStore(str(tmp_path))
    first, second = (f"artifacts/{KEYS[0][:2]}/{KEYS[0]}/{'0' * 32}/{name}" for name in "ab")
    for path in (write(store, first, b"1"), write(store, second, b"2")):
        os.utime(path, (time.time() - 2 * HOUR_S,) * 2)
    os.utime(tmp_path / second)  # a slow writer is still at it
    assert collect_garbage(store, min_age_s=HOUR_S, dry_run=False).removed_objects == ()
    os.utime(tmp_path / second, (time.time() - 2 * HOUR_S,) * 2)
    assert len(collect_garbage(store, min_age_s=HOUR_S, dry_run=False).removed_objects) == 2


def test_gc_dry_run_reports_the_same_and_removes_nothing(store):
    for key in KEYS[:3]:
        store.publish(key, {"a": b"12345"}, meta={})
    store.write_ref("one", {"keys": {"load": KEYS[0]}})
    write(store, orphan_path(KEYS[4]), b"orphan")
    before = files_of(store)
    sizes = {path: store.fs.info(f"{store.root}/{path}")["size"] for path in before}
    planned = collect_garbage(store, min_age_s=0, dry_run=True)
    assert files_of(store) == before
    assert collect_garbage(store, min_age_s=0, dry_run=False) == planned
    assert planned.freed_bytes == sum(sizes[path] for path in before - files_of(store))


def test_gc_refuses_to_judge_while_a_run_record_is_unreadable(store):
    store.publish(KEYS[0], {"a": b"1"}, meta={})
    for damaged in (b"{", b'{"keys": ["not a mapping"]}'):
        write(store, "refs/runs/one.json", damaged)
        with pytest.raises(ArtifactCorrupted, match="one"):
            collect_garbage(store, min_age_s=0, dry_run=False)
    assert store.has(KEYS[0])


def test_gc_leaves_a_live_artifact_with_an_unreadable_manifest_alone_and_removes_a_dead_one(store):
    for key in KEYS[:2]:
        store.publish(key, {"a": b"1"}, meta={})
        write(store, f"artifacts/{key[:2]}/{key}/manifest.json", b"{")
    store.write_ref("one", {"keys": {"load": KEYS[0]}})
    report = collect_garbage(store, min_age_s=0, dry_run=False)
    assert (report.kept_keys, report.removed_keys) == ((KEYS[0],), (KEYS[1],))
    assert sum(KEYS[0] in path for path in files_of(store)) == 2
    assert not any(KEYS[1] in path for path in files_of(store))


def test_gc_of_an_empty_store_finds_nothing(store):
    assert collect_garbage(store, min_age_s=0, dry_run=False) == GcReport((), (), 0, ())


WRITER = """
import hashlib, sys
from prefixquant.cluster.store import ArtifactStore
store = ArtifactStore(sys.argv[1])
for i in range(40):
    store.publish(hashlib.sha256(b"%d" % i).hexdigest(), {"a": bytes(200_000), "b": b"%d" % i}, meta={})
"""


def test_gc_beside_a_writer_at_work_loses_nothing_of_it(tmp_path):
    store = ArtifactStore(str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store.url])
    while writer.poll() is None:
        collect_garbage(store, min_age_s=60, dry_run=False)
    assert writer.returncode == 0
    for i in range(40):
        assert store.read(hashlib.sha256(b"%d" % i).hexdigest(), "b") == b"%d" % i
