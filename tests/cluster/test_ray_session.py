import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle
from waiting import wait_until

from prefixquant.cluster.ray_session import TaskLostError, assigned_gpus, connect

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


def add(a, b):
    return a + b


def fail(message):
    raise ValueError(message)


def sleep(seconds, marker):
    Path(marker).touch()
    for _ in range(10 * seconds):
        time.sleep(0.1)  # Ray interrupts between two steps of Python, not within one


def die_once(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "second"


def die_always(path):
    with open(path, "a") as attempts:
        attempts.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def fail_once_reading(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        raise OSError("the disk was busy")
    return "second"


def gpus_here():
    return assigned_gpus()


def test_submit_returns_what_the_function_returns(ray_session):
    refs = {ray_session.submit(add, i, 1, name=f"add {i}"): i for i in range(3)}
    pending, got = list(refs), {}
    while pending:
        for ref in ray_session.wait(pending, timeout=30):
            pending.remove(ref)
            got[refs[ref]] = ray_session.result(ref)
    assert got == {0: 1, 1: 2, 2: 3}


def test_result_raises_the_error_of_the_task_itself(ray_session):
    ref = ray_session.submit(fail, "scale must be positive", name="fail")
    with pytest.raises(ValueError, match=r"^scale must be positive$") as caught:
        ray_session.result(ref)
    assert type(caught.value) is ValueError
    assert "in fail" in str(caught.value.__cause__)  # the worker's traceback


def test_a_task_is_tried_again_after_the_death_of_its_worker_or_an_oserror(ray_session, tmp_path):
    killed = ray_session.submit(die_once, str(tmp_path / "killed"), name="die")
    failed = ray_session.submit(fail_once_reading, str(tmp_path / "failed"), name="read")
    assert ray_session.result(killed) == "second"
    assert ray_session.result(failed) == "second"


def test_a_task_that_always_kills_its_worker_is_lost_after_three_attempts(ray_session, tmp_path):
    ref = ray_session.submit(die_always, str(tmp_path / "attempts"), name="die")
    with pytest.raises(TaskLostError, match="died"):
        ray_session.result(ref)
    assert (tmp_path / "attempts").read_text() == "xxx"


def test_wait_returns_nothing_after_its_timeout_and_cancel_interrupts(ray_session, tmp_path):
    ref = ray_session.submit(sleep, 600, str(tmp_path / "begun"), name="sleep")
    assert ray_session.wait([ref], timeout=0.2) == []
    wait_until((tmp_path / "begun").exists)
    start = time.monotonic()
    ray_session.cancel([ref])
    with pytest.raises(TaskLostError):
        ray_session.result(ref)
    assert time.monotonic() - start < 60


def test_what_is_abandoned_ends_where_ray_outlives_the_session(ray_session, tmp_path):
    with connect() as other:  # Ray was there before
        ref = other.submit(sleep, 600, str(tmp_path / "begun"), name="sleep")
        wait_until((tmp_path / "begun").exists)
        other.abandon([ref])
        with pytest.raises(TaskLostError):
            other.result(ref)


def test_a_request_for_more_than_the_cluster_has_is_cut_to_fit(ray_session):
    assert (ray_session.cpus, ray_session.gpus) == (2, 0)
    assert ray_session.fit(64, 8) == (2, 0)
    assert ray_session.fit(1, 0.5) == (1, 0)
    ref = ray_session.submit(gpus_here, name="wants a GPU", cpus=64, gpus=1)
    assert ray_session.wait([ref], timeout=60) == [ref]  # it would wait for ever otherwise
    assert ray_session.result(ref) == []


def test_memory_and_disk_are_asked_for_and_cut_to_what_a_node_has(ray_session):
    whole = ray_session.fit_bytes(10**15, 10**15)
    assert 10**8 < whole["memory"] < 10**15
    assert 0 < whole["resources"]["disk_gb"] < 10**6
    assert ray_session.fit_bytes(10**6, 5 * 10**6) == {"memory": 10**6, "resources": {"disk_gb": 1}}
    assert ray_session.fit_bytes(0, 0) == {}
    ref = ray_session.submit(add, 1, 2, name="wants a lot", memory=10**15, disk=10**15)
    assert ray_session.wait([ref], timeout=60) == [ref]
    assert ray_session.result(ref) == 3


def test_the_gpu_is_unknown_where_there_is_none_and_as_said_where_it_is_said(ray_session):
    assert ray_session.gpu() is None
    with connect(gpu_bytes=80 * 10**9) as other:
        assert other.gpu() == ("", 80 * 10**9)


def test_connect_joins_the_running_ray_and_leaves_it_running(ray_session):
    with connect() as other:
        assert other.result(other.submit(add, 1, 1, name="add")) == 2
    assert ray_session.result(ray_session.submit(add, 2, 2, name="add")) == 4


SCRIPT = """
import os, pathlib
from prefixquant.cluster.ray_session import assigned_gpus, connect

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}

def gpus():
    return assigned_gpus()

def descendants(pid):
    try:
        children = [int(c) for c in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(p for child in children for p in descendants(child))]

def listening():  # addresses, in the kernel's hex, that this process and its children listen on
    inodes = set()
    for pid in descendants(os.getpid()):
        try:
            files = list(pathlib.Path(f"/proc/{pid}/fd").iterdir())
        except OSError:  # a worker that has ended
            continue
        for fd in files:
            try:
                inodes.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                pass
    rows = [row.split() for kind in ("tcp", "tcp6") for row in open(f"/proc/net/{kind}")]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}

with connect(num_cpus=1, num_gpus=2, object_store_bytes=100 * 2**20) as session:
    assert session.gpus == 2 and session.fit(4, 8) == (1, 2), session.fit(4, 8)
    assert session.result(session.submit(gpus, name="none")) == []
    one = session.result(session.submit(gpus, name="one", gpus=1))
    assert len(one) == 1, one
    found = listening()
    assert found and found <= LOOPBACK, found
print("fine")
"""


def test_a_session_of_its_own_gives_gpus_to_tasks_and_listens_on_loopback_only():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stderr


def test_connect_to_an_address_without_a_cluster_fails_at_once_and_names_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
        connect(f"127.0.0.1:{port}")
