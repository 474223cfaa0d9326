"""A real MLflow server whose artifacts lie on a real S3 server, with several processes that write at the same time."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import s3fs
from ports import free_ports
from s3 import environment, make_bucket, s3_server, use

WRITERS, STEPS = 4, 60

WRITE = """
import sys
from prefixquant.pipeline.tracking import Tracker
uri, number, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tracker = Tracker.start(uri=uri, experiment="prefixquant", run_name=f"writer-{number}", run_id=None,
                        params={"quantize.weights.bits": number}, tags={"run_id": f"writer-{number}"})
for step in range(steps):
    tracker.log_metrics({"block/error": number + step, "block/seconds": 1.0, "block/loss": 0.5}, step=step)
tracker.log_text(f"# Report of {number}", "report.md")
tracker.log_dict({"writer": number}, "recipe.json")
tracker.finish("FINISHED")
assert tracker.failures == [], tracker.failures
"""


@pytest.fixture
def server(tmp_path):
    """The server's address, and the bucket in which its artifacts lie."""
    with s3_server() as endpoint:
        bucket = make_bucket(endpoint, "mlflow")
        (port,) = free_ports(1)
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{tmp_path}/mlflow.db",
            "--artifacts-destination",
            f"{bucket}/runs",
        ]
        variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | environment(endpoint) | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
            yield f"http://127.0.0.1:{port}", f"{bucket}/runs", endpoint
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 180
    while True:
        try:
            urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


def test_several_writers_at_one_server_lose_nothing_and_need_no_keys_of_its_bucket(server, monkeypatch):
    import mlflow

    uri, place, endpoint = server
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    clean |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}  # five processes begin at once
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, uri, str(number), str(STEPS)], env=clean, stderr=subprocess.PIPE)
        for number in range(WRITERS)
    ]
    for writer in writers:
        _, stderr = writer.communicate(timeout=300)
        assert writer.returncode == 0, stderr.decode()
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("prefixquant").experiment_id])
    assert sorted(run.data.tags["run_id"] for run in runs) == [f"writer-{number}" for number in range(WRITERS)]
    use(endpoint, monkeypatch)
    bucket = s3fs.S3FileSystem(use_listings_cache=False)
    for run in runs:
        number = int(run.data.params["quantize.weights.bits"])
        history = client.get_metric_history(run.info.run_id, "block/error")
        assert [(point.step, point.value) for point in history] == [(step, number + step) for step in range(STEPS)]
        (report,) = bucket.glob(f"{place}/**/{run.info.run_id}/artifacts/report.md")
        assert bucket.cat_file(report) == f"# Report of {number}".encode()
