"""The rows of docs/faults.md that take several nodes: what is killed or full, and what is left at the end."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from disturbed import BLOCKS, SLOW, Driver, digests, stored_blocks, undisturbed, write_model
from nodes import Nodes
from processes import kill
from s3 import environment, make_bucket, s3_server, use
from waiting import wait_until

from prefixquant.cluster.store import ArtifactStore


@pytest.fixture(scope="module")
def nodes():
    with Nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def calm(finished, tmp_path_factory):
    """A recipe of many blocks: its file and graph, and the digests of an undisturbed run."""
    world = type(finished)(tmp_path_factory.mktemp("calm"))
    write_model(world.model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    graph, wanted = undisturbed(world.recipe(SLOW), world.folder / "undisturbed")
    torch.set_num_threads(threads)
    return SimpleNamespace(file=world.recipe_file(SLOW), graph=graph, wanted=wanted)


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of so many KiB."""
    mounted = []

    def make(name, kilobytes):
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_killed_worker_and_a_killed_node_cost_what_they_were_doing(nodes, calm, store):
    with Driver(nodes, calm.file, store.url) as driver:
        wait_until(lambda: len(stored_blocks(store, calm.graph)) >= 1, shown=driver.process.poll)
        victim = wait_until(lambda: nodes.workers("ray::block"))[0]
        assert kill(victim)
        wait_until(lambda: len(stored_blocks(store, calm.graph)) >= 3)
        wait_until(lambda: nodes.workers("ray::block"))
        nodes.remove(nodes.nodes[0])
        status, summary, stderr = driver.wait()
    assert status == 0, stderr
    assert summary["tasks_run"] == len(calm.graph.order)
    assert digests(store, calm.graph) == calm.wanted
    nodes.add()


def test_a_killed_driver_and_a_restarted_head_cost_the_tasks_under_way(nodes, calm, store):
    with Driver(nodes, calm.file, store.url) as driver:
        wait_until(lambda: len(stored_blocks(store, calm.graph)) >= 1, shown=driver.process.poll)
        driver.kill()
    wait_until(lambda: not nodes.workers())  # the cluster is free again
    kept = stored_blocks(store, calm.graph)
    assert 1 <= len(kept) < BLOCKS
    with Driver(nodes, calm.file, store.url) as driver:
        wait_until(lambda: len(stored_blocks(store, calm.graph)) > len(kept), shown=driver.process.poll)
        nodes.restart_head()
        status, _, stderr = driver.wait()
    assert status == 1, stderr
    assert stderr  # Ray ends the process itself, in words of its own, "Failed to connect to GCS" as a rule
    kept = stored_blocks(store, calm.graph)
    times = {name: store.manifest(calm.graph.key(name)).meta["seconds"] for name in kept}
    with Driver(nodes, calm.file, store.url) as driver:
        status, summary, stderr = driver.wait()
    assert status == 0, stderr
    assert summary["tasks_cached"] >= len(kept)
    assert times == {name: store.manifest(calm.graph.key(name)).meta["seconds"] for name in kept}  # none was rebuilt
    assert digests(store, calm.graph) == calm.wanted


def test_a_node_whose_disk_is_full_goes_on_from_memory(calm, small_disk, monkeypatch):
    cache = small_disk("cache", 64)
    (cache / "filling").write_bytes(bytes(48 * 1024))
    with s3_server() as endpoint:
        url = f"{make_bucket(endpoint, 'disk')}/store"
        variables = environment(endpoint)
        with Nodes(0, **variables) as nodes:  # the head as well: what is cheap runs there too
            nodes.add(PREFIXQUANT_CACHE=str(cache))
            with Driver(nodes, calm.file, url, **variables) as driver:
                status, _, stderr = driver.wait()
        assert status == 0, stderr
        use(endpoint, monkeypatch)
        assert digests(ArtifactStore(url), calm.graph) == calm.wanted


def test_a_store_whose_disk_is_full_ends_the_run_with_one_message_and_the_next_goes_on(nodes, calm, small_disk):
    disk = small_disk("store", 700)
    store = ArtifactStore(str(disk))
    with Driver(nodes, calm.file, store.url) as driver:
        status, _, stderr = driver.wait()
    assert status == 1, stderr
    assert "no space left" in stderr
    assert "Traceback" not in stderr
    kept = {key: store.manifest(key).meta for key in store.keys()}  # noqa: SIM118, a store is no dict
    assert kept
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    with Driver(nodes, calm.file, store.url) as driver:
        status, _, stderr = driver.wait()
    assert status == 0, stderr
    assert digests(store, calm.graph) == calm.wanted
