"""The store against a real S3 server, behind a proxy that throttles, cuts, alters and loses what passes it."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import s3fs
from s3 import KEYS, Answer, FaultyS3, alter, behind_proxy, lose_answer, make_bucket, refuse, s3_server, truncate

from prefixquant.cluster.store import (
    ArtifactCorrupted,
    ArtifactError,
    ArtifactStore,
    StoreUnavailable,
    StoreUnreadable,
    StoreUnwritable,
)

KEY = hashlib.sha256(b"first").hexdigest()
SLOW_DOWN = refuse(503, "SlowDown", "Please reduce your request rate.")
EXPIRED = refuse(400, "ExpiredToken", "The provided token has expired.")
DATA = os.urandom(200_000)


@pytest.fixture(scope="module")
def backend():
    with s3_server() as endpoint:
        make_bucket(endpoint, "bucket")
        yield endpoint


@pytest.fixture
def s3(backend, monkeypatch, tmp_path):
    with behind_proxy(backend, monkeypatch, tmp_path / "cache") as proxy:
        yield proxy


@pytest.fixture
def store(s3, request):
    return ArtifactStore(f"s3://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}")


def objects(store):
    return sorted(path.rpartition("/")[2] for path in store.fs.find(store.root))


def first(count, fault, method=None, contains=""):
    """Return what does `fault` to the first requests of this kind, so many of them."""
    left = [count]

    def choose(request):
        if (method is None or request.method == method) and contains in request.path and left[0]:
            left[0] -= 1
            return fault
        return None

    return choose


def test_throttling_that_passes_costs_time_alone(s3, store):
    s3.fault = lambda request: SLOW_DOWN if request.number % 3 == 1 else None
    store.publish(KEY, {"a": DATA}, meta={})
    assert store.read(KEY, "a") == DATA
    assert store.local_path(KEY, "a").read_bytes() == DATA
    assert len([each for each in s3.requests if each.number % 3 == 1]) >= 3


def test_throttling_without_end_is_one_error_after_a_bounded_number_of_requests(s3, store):
    store.publish(KEY, {"a": DATA}, meta={})
    before = len(s3.requests)
    s3.fault = lambda request: SLOW_DOWN
    with pytest.raises(
        StoreUnavailable, match=r"(Service Unavailable|reduce your request rate).*tried several times.*run again"
    ) as caught:
        store.read(KEY, "a")
    assert isinstance(caught.value, OSError)  # so a task is tried again, on its worker or another
    assert len(s3.requests) - before == 5  # s3fs tries five times, its client AWS_MAX_ATTEMPTS times each: here once
    with pytest.raises(StoreUnavailable):
        store.publish(hashlib.sha256(b"other").hexdigest(), {"a": b"1"}, meta={})


@pytest.mark.parametrize("fault", [truncate, alter], ids=["truncated", "altered"])
def test_a_read_that_is_cut_or_altered_on_its_way_is_read_again(s3, store, fault):
    store.publish(KEY, {"a": DATA}, meta={})
    for read in (lambda: store.read(KEY, "a"), lambda: store.local_path(KEY, "a").read_bytes()):
        s3.fault = first(1, fault, "GET", "/a")
        assert read() == DATA
    assert store.has(KEY)


def test_an_object_that_stays_wrong_is_corruption_and_never_reaches_the_cache(s3, store, tmp_path):
    store.publish(KEY, {"a": DATA}, meta={})
    s3.fault = lambda request: alter if request.method == "GET" and request.path.endswith("/a") else None
    for read in (store.read, store.local_path):
        with pytest.raises(ArtifactCorrupted, match="expected 200000 bytes with sha256"):
            read(KEY, "a")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["manifest.json", "/a"])
def test_a_write_whose_answer_is_lost_is_still_one_whole_artifact(s3, store, name):
    s3.fault = first(1, lose_answer, "PUT", name)
    store.publish(KEY, {"a": DATA}, meta={"n": 1})
    assert store.read(KEY, "a") == DATA
    assert objects(store) == ["a", "manifest.json"]  # its own manifest did not make it think that another had won


def test_expired_credentials_are_one_clear_error_after_one_request_and_show_no_secret(s3, store, monkeypatch):
    store.publish(KEY, {"a": b"1"}, meta={})
    s3.fault = lambda request: EXPIRED
    for act, kind in (
        (lambda: store.read(KEY, "a"), StoreUnreadable),
        (lambda: store.has(KEY), StoreUnreadable),
        (store.run_ids, StoreUnreadable),
        (store.check_writable, StoreUnwritable),
        (lambda: store.publish(hashlib.sha256(b"2").hexdigest(), {"a": b"1"}, meta={}), StoreUnreadable),
        (lambda: store.write_ref("run", {}), StoreUnwritable),
    ):
        before = len(s3.requests)
        with pytest.raises(kind, match=r"token has expired.*renew credentials") as caught:
            act()
        assert not isinstance(caught.value, OSError)  # a task that meets it is not tried again
        assert len(s3.requests) - before == 1
        assert KEYS["AWS_SECRET_ACCESS_KEY"] not in re.sub("artifact|test_|latest", "", str(caught.value))


def test_no_credentials_are_named(s3, store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    fresh = ArtifactStore(store.url)
    with pytest.raises(StoreUnwritable, match="credentials"):
        fresh.check_writable()


def test_a_dead_endpoint_is_named_and_worth_another_try(s3, store, monkeypatch):
    with FaultyS3(s3.endpoint) as gone:
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", gone.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreUnavailable, match=gone.endpoint):
        ArtifactStore(store.url).has(KEY)


def test_endpoint_and_region_come_from_the_environment(s3, store, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    s3fs.S3FileSystem.clear_instance_cache()
    ArtifactStore(store.url).check_writable()
    assert s3.requests
    assert all("/eu-central-1/s3/aws4_request" in each.headers["Authorization"] for each in s3.requests)


@pytest.mark.parametrize(
    "url", ["s3://key:hunter2@bucket/store", "s3://bucket/store?X-Amz-Signature=hunter2"], ids=["user", "query"]
)
def test_a_store_url_with_a_secret_in_it_is_refused_and_does_not_show_it(url):
    with pytest.raises(ArtifactError, match="by the environment") as caught:
        ArtifactStore(url)
    assert "hunter2" not in str(caught.value)


WRITER = """
import sys
from prefixquant.cluster.store import ArtifactStore
ArtifactStore(sys.argv[1]).publish(sys.argv[2], {"a": b"p" * 6_000_000, "b": b"q" * 1_000_000}, meta={})
"""


def test_a_writer_killed_between_data_and_manifest_leaves_no_artifact_and_the_next_one_publishes(s3, store):
    reached, dead = threading.Event(), threading.Event()

    def stop_at_manifest(request, ask):
        reached.set()
        dead.wait(60)  # and with the writer its connection
        return Answer(0)

    s3.fault = lambda request: (
        stop_at_manifest if (request.method, "manifest" in request.path) == ("PUT", True) else None
    )
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store.url, KEY])
    assert reached.wait(60), writer.poll()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    dead.set()
    s3.fault = lambda request: None
    assert objects(store) == ["a", "b"]
    assert not store.has(KEY)
    assert store.keys() == []
    store.publish(KEY, {"a": b"2"}, meta={"writer": "second"})
    assert (store.read(KEY, "a"), store.manifest(KEY).meta) == (b"2", {"writer": "second"})
