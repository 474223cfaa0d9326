import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ray
from processes import alive
from ray import cloudpickle
from waiting import wait_until

from prefixquant.cluster.errors import ResourceError
from prefixquant.cluster.ray_session import TaskLostError
from prefixquant.cluster.worker_group import run_group

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


def introduce(member, directory):
    (Path(directory) / f"{member.rank}").write_text(
        f"{member.size} {os.getpid()} {member.master_addr}:{member.master_port}"
    )
    return f"rank {member.rank}"


def die(member, directory, rank, times):
    """Rank `rank` is killed the first `times` times, while the others wait for it."""
    deaths = Path(directory) / "deaths"
    seen = len(deaths.read_text()) if deaths.exists() else 0
    if member.rank == rank and seen < times:
        deaths.write_text("x" * (seen + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    while not deaths.exists() or len(deaths.read_text()) < times:
        time.sleep(0.05)
    return "done"


def die_and_break_connections(member, directory):
    """Rank 1 dies once; rank 0 notices by an error, as of a broken connection."""
    died = Path(directory) / "died"
    if member.rank == 1 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if member.rank == 0 and not (Path(directory) / "noticed").exists():
        (Path(directory) / "noticed").touch()
        raise RuntimeError("Connection closed by peer")
    return "done"


def fail(member, kind, rank):
    if member.rank == rank:
        raise kind("block 3: the loss is nan")
    time.sleep(600)


def fail_with_consequences(member):
    if member.rank == 1:
        time.sleep(0.5)
        raise ValueError("the cause")
    raise RuntimeError("Connection closed by peer")


def fail_reading_once(member, directory):
    failed = Path(directory) / "failed"
    if member.rank == 0 and not failed.exists():
        failed.touch()
        raise OSError("the disk was busy")
    return "read"


def wait_for_ever(member, directory):
    (Path(directory) / f"{member.rank}").write_text(str(os.getpid()))
    time.sleep(600)


def wait_once(member, directory):
    """Wait for ever in the first group, whose supervisor the test kills."""
    mark = Path(directory) / f"{member.rank}"
    if not mark.exists():
        mark.write_text(str(os.getpid()))
        time.sleep(600)
    return "second"


def supervise(directory):
    Path(directory, "supervisor").write_text(str(os.getpid()))
    return run_group(wait_once, (directory,), ranks=2, cpus=1, gpus=0, name="supervised")


@pytest.fixture
def _leaves_nothing(ray_session):
    yield
    wait_until(lambda: ray.available_resources().get("CPU") == 2)
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


pytestmark = pytest.mark.usefixtures("_leaves_nothing")


def test_a_group_knows_its_members_and_returns_what_rank_0_returns(ray_session, tmp_path):
    ref = ray_session.submit_group(introduce, str(tmp_path), name="hello", ranks=4, cpus=0.5)
    assert ray_session.result(ref) == "rank 0"
    said = [(tmp_path / str(rank)).read_text().split() for rank in range(4)]
    assert {size for size, _, _ in said} == {"4"}
    assert len({pid for _, pid, _ in said}) == 4
    assert len({place for _, _, place in said}) == 1
    wait_until(lambda: not any(alive(int(pid)) for _, pid, _ in said))


def test_a_group_runs_from_the_driver_too(ray_session, tmp_path):
    assert run_group(introduce, (str(tmp_path),), ranks=1, cpus=1, gpus=0, name="alone") == "rank 0"


def test_the_death_of_one_rank_starts_the_whole_group_again(ray_session, tmp_path):
    ref = ray_session.submit_group(die, str(tmp_path), 1, 1, name="dies once", ranks=2)
    assert ray_session.result(ref) == "done"


def test_a_death_counts_as_such_even_if_another_rank_notices_it_first(ray_session, tmp_path):
    ref = ray_session.submit_group(die_and_break_connections, str(tmp_path), name="breaks", ranks=2)
    assert ray_session.result(ref) == "done"


def test_a_rank_that_always_dies_is_lost_and_named(ray_session, tmp_path):
    with pytest.raises(TaskLostError, match=r"^dies: rank 1 of 2 was lost in attempt 2 of 2"):
        run_group(die, (str(tmp_path), 1, 9), ranks=2, cpus=1, gpus=0, max_restarts=1, name="dies")
    assert (tmp_path / "deaths").read_text() == "xx"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_error_in_one_rank_ends_the_group_at_once_with_that_error(ray_session, kind):
    start = time.monotonic()
    ref = ray_session.submit_group(fail, kind, 1, name="fails", ranks=2)
    with pytest.raises(kind, match=r"^block 3: the loss is nan$") as caught:
        ray_session.result(ref)
    assert "in fail" in str(caught.value.__cause__)  # the worker's traceback
    assert time.monotonic() - start < 300  # the other rank sleeps for ten minutes


def test_the_error_that_is_raised_is_the_cause_not_its_consequences(ray_session):
    with pytest.raises(ValueError, match="the cause"):
        run_group(fail_with_consequences, (), ranks=2, cpus=1, gpus=0, name="fails")


def test_an_oserror_starts_the_group_again(ray_session, tmp_path):
    assert run_group(fail_reading_once, (str(tmp_path),), ranks=2, cpus=1, gpus=0, name="reads") == "read"


def test_a_cancelled_group_leaves_no_process(ray_session, tmp_path):
    ref = ray_session.submit_group(wait_for_ever, str(tmp_path), name="waits", ranks=2)
    wait_until(lambda: len([each for each in tmp_path.iterdir() if each.read_text()]) == 2)
    ray_session.cancel([ref])
    with pytest.raises(TaskLostError):
        ray_session.result(ref)
    wait_until(lambda: not any(alive(int(each.read_text())) for each in tmp_path.iterdir()))


def test_the_death_of_the_supervising_process_is_survived(ray_session, tmp_path):
    ref = ray_session.submit(supervise, str(tmp_path), name="supervisor", cpus=0)
    wait_until(lambda: len([each for each in tmp_path.iterdir() if each.read_text()]) == 3)
    os.kill(int((tmp_path / "supervisor").read_text()), signal.SIGKILL)
    assert ray_session.result(ref) == "second"


@pytest.mark.parametrize(("ranks", "cpus", "gpus"), [(3, 1, 0), (1, 3, 0), (1, 1, 1)])
def test_a_group_that_the_cluster_cannot_hold_is_refused_at_once(ray_session, ranks, cpus, gpus):
    start = time.monotonic()
    with pytest.raises(
        ResourceError, match=rf"^big: {ranks} ranks of {cpus} CPU.*has room for . \(1 nodes, 2 CPU, 0 GPU"
    ):
        run_group(fail, (), ranks=ranks, cpus=cpus, gpus=gpus, name="big")
    assert time.monotonic() - start < 60  # it would wait for two minutes
