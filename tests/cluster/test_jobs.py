"""Jobs on a real Ray head with a dashboard, on loopback, through the command line as a user types it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import yaml
from ports import free_ports
from processes import MARK, end_marked, kill, running
from waiting import wait_until

from prefixquant.cluster.jobs import JobCluster, JobError, JobSpec
from prefixquant.cluster.store import ArtifactStore
from prefixquant.pipeline.cli import main

BIN = Path(sys.executable).parent
BLOCKS = 8
SLOW = "search={coarse_points: 60, fine_points: 30, weight_points: 4}"
"""About a second a block."""
SECRET = "hunter2"

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))} | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "disabled",  # loopback only; otherwise it depends on a token file in the home folder
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds every socket to loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "COLUMNS": "240",
}


@pytest.fixture(scope="module")
def head():
    """The dashboard's address of a head of two CPUs; every process of it ends with the module."""
    folder = Path(tempfile.mkdtemp(prefix="pq-", dir="/tmp"))  # short: Ray makes sockets in it
    port, dashboard, *others = free_ports(6)
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "ray-client-server-port",
    )
    options = {
        "port": port,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "num-cpus": 2,
        "num-gpus": 0,
        "object-store-memory": 100 * 2**20,
        "temp-dir": folder / "ray",
        **dict(zip(names, others, strict=True)),
    }
    mark = uuid.uuid4().hex
    with open(folder / "log", "w") as log:
        command = [BIN / "ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        server = subprocess.Popen(
            command, env=ENVIRONMENT | {MARK: mark}, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:

        def up():
            try:
                return JobCluster(address).list() == []
            except (ConnectionError, JobError):
                return server.poll() is not None

        wait_until(up, shown=(folder / "log").read_text)
        assert server.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=60)
        end_marked(mark)
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights, a text, and a recipe of relative paths that takes some seconds."""
    folder = tmp_path_factory.mktemp("jobs")
    tiny.write_tiny_model(folder / "model", blocks=BLOCKS)
    text = "\n".join(
        json.dumps({"text": f"{index} the prefix carries what one scale cannot " * 8}) for index in range(8)
    )
    (folder / "text.jsonl").write_text(text)
    recipe = {
        "name": "tiny",
        "model": {"source": "model"},
        "data": {
            "calibration": "text.jsonl",
            "statistics": {"sequences": 4, "length": 32},
            "search": {"sequences": 2, "length": 32},
        },
        "evaluate": {"texts": ["text.jsonl"], "window": 32, "max_windows": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def command(head, folder, monkeypatch, capsys):
    """Run `prefixquant ARGUMENTS` on the head, from the folder, with a secret and a misleading address around it."""
    for name, value in (ENVIRONMENT | {"TOKEN": SECRET, "RAY_ADDRESS": "127.0.0.1:1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prefixquant", *map(str, arguments), "--address", head])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
        return (status, *capsys.readouterr())

    return run


def stored_blocks(store):
    """Return the keys of the blocks in a store."""
    found = set()
    for path in store.glob("artifacts/*/*/manifest.json"):
        with suppress(FileNotFoundError):  # of a stream that has served
            manifest = json.loads(path.read_text())
            if manifest["meta"]["task"] == "block":
                found.add(manifest["key"])
    return found


def test_a_recipe_submitted_again_goes_on_where_a_stopped_job_ended(head, folder, command, tmp_path):
    store = tmp_path / "store"
    submit = ("submit", "recipe.yaml", SLOW, "--working-dir", folder, "--store", store, "--tracking", "off")

    status, stdout, stderr = command(*submit, "--no-follow", "--env", "TOKEN")
    assert status == 0, stderr
    stopped = stdout.strip()
    assert f"prefixquant job stop {stopped} --address {head}" in stderr
    wait_until(lambda: len(stored_blocks(store)) >= 2, seconds=300)
    assert command("job", "stop", stopped)[:2] == (0, f"{stopped}: STOPPED\n")
    first = stored_blocks(store)
    assert 2 <= len(first) < BLOCKS
    (run_id,) = ArtifactStore(str(store)).run_ids()
    assert ArtifactStore(str(store)).read_ref(run_id)["status"] == "interrupted"  # it had the time to write it down

    out = tmp_path / "out"
    status, stdout, stderr = command(*submit, "--out", out, "--json")
    assert status == 0, stderr
    answer = json.loads(stdout.splitlines()[-1])
    assert (answer["status"], answer["run"]["run_id"], answer["run"]["out"]) == ("SUCCEEDED", run_id, str(out))
    assert first < stored_blocks(store)
    assert answer["run"]["tasks_cached"] >= len(first)
    assert answer["run"]["tasks_run"] >= BLOCKS - len(first)
    assert (out / "prefixquant.json").is_file()

    status, stdout, stderr = command("job", "list", "--json")
    states = {job["job_id"]: job["status"] for job in json.loads(stdout)["jobs"]}
    assert (states[stopped], states[answer["job_id"]]) == ("STOPPED", "SUCCEEDED")
    assert SECRET not in stdout + stderr + command("job", "logs", stopped)[1]
    shown = command("job", "list")[1] + command("job", "status", stopped)[1]
    assert shown.count(stopped) == 2

    # The plain command of Ray, where the cluster has the package installed. Nothing is left to do.
    plain = [BIN / "ray", "job", "submit", "--address", head, "--runtime-env-json", '{"working_dir": "."}', "--"]
    plain += ["prefixquant", "run", "recipe.yaml", SLOW, "--store", str(store), "--address", "auto", "--json"]
    done = subprocess.run(plain, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"run_id"')))
    assert (summary["run_id"], summary["tasks_run"]) == (run_id, 0)


def test_ctrl_c_ends_the_following_and_not_the_job_whose_death_is_a_failure(head, command):
    cluster = JobCluster(head)
    job_id = f"sleep-{uuid.uuid4().hex}"
    spec = JobSpec(job_id=job_id, command=("python", "-c", f"import time; print('{job_id} is up'); time.sleep(600)"))
    cluster.submit(spec)
    wait_until(lambda: f"{spec.job_id} is up\n" in cluster.logs(spec.job_id))
    follower = subprocess.Popen(
        [BIN / "prefixquant", "job", "logs", "--follow", spec.job_id, "--address", head],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("is up" in line for line in follower.stdout)
    follower.send_signal(signal.SIGINT)  # as Ctrl-C does
    _, stderr = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert f"job {spec.job_id} goes on" in stderr
    assert f"prefixquant job stop {spec.job_id} --address {head}" in stderr
    assert cluster.get(spec.job_id).status == "RUNNING"
    for driver in running(lambda _, line: line.startswith("python -c") and spec.job_id in line):
        kill(driver)
    status, _, stderr = command("job", "logs", "--follow", spec.job_id)
    assert (status, f"job {spec.job_id} FAILED" in stderr) == (1, True), stderr


LOOK = """
import os, sys, ray
import prefixquant.tasks as package
from importlib.metadata import distribution

ray.init(address="auto", log_to_driver=False)

@ray.remote
def look():
    import prefixquant.tasks as package
    return package.__file__, os.getcwd(), os.environ["TOKEN"]

print(package.__file__, distribution("prefixquant").locate_file(""))
print(*ray.get(look.remote()), open("note.txt").read())
sys.exit(3)
"""


def test_a_job_and_its_tasks_use_the_package_and_the_files_that_came_with_it(head):
    cluster = JobCluster(head)
    spec = JobSpec(
        job_id=f"look-{uuid.uuid4().hex}",
        command=("python", "-c", LOOK),
        files={"note.txt": b"and the file"},
        env={"TOKEN": "given"},
        metadata={"recipe": "look"},
    )
    cluster.submit(spec)
    written = []
    job = cluster.follow(spec.job_id, written.append)
    log = "".join(written)
    assert (job.status, job.exit_code, job.ended) == ("FAILED", 3, True), log
    assert (job.metadata, job.started < job.finished) == ({"recipe": "look"}, True)
    assert log == cluster.logs(spec.job_id)
    driver, task = log.splitlines()[-2:]
    for path in (*driver.split(), task.split()[0]):
        assert "py_modules_files" in path  # not the installation that the cluster has as well
    assert "working_dir_files" in task.split()[1]
    assert task.endswith("given and the file")
    with pytest.raises(JobError, match="already"):
        cluster.submit(spec)
    assert cluster.stop(spec.job_id).status == "FAILED"  # it had ended before


def test_unknown_jobs_and_wrong_addresses_are_one_error_each(head):
    cluster = JobCluster(head)
    for ask in (cluster.get, cluster.logs, cluster.stop):
        with pytest.raises(JobError, match=r"job nope .*does not exist"):
            ask("nope")
    (port,) = free_ports(1)
    with pytest.raises(ConnectionError, match=f"no Ray dashboard answers at http://127.0.0.1:{port} "):
        JobCluster(f"http://me:secret@127.0.0.1:{port}")
    for address in ("127.0.0.1:6379", "ray://127.0.0.1:10001", "auto"):
        with pytest.raises(JobError, match="http://HEAD:8265"):
            JobCluster(address)
