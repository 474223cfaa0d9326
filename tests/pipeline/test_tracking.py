import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path

import pytest

from prefixquant.pipeline.tracking import FLUSH_POINTS, LONG_PARAMS_FILE, Tracker, TrackingError, flatten, list_runs

EXPERIMENT = "prefixquant"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "new folder" / "mlflow.db"


@pytest.fixture(scope="module")
def uri(database):
    return f"sqlite:///{database}"


def start(uri, run_id=None, experiment=EXPERIMENT, **values):
    params, tags = values.pop("params", {}), values.pop("tags", {})
    return Tracker.start(uri=uri, experiment=experiment, run_name="demo", run_id=run_id, params=params, tags=tags)


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def test_metrics_params_tags_and_artifacts_read_back(uri, database, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("small")
    tracker = start(uri, params={"quantize.weights.bits": 4, "train": "off"}, tags={"git": "abc"})
    for block in range(3):
        tracker.log_metrics({"block/mse": 0.5**block, "block/seconds": math.nan}, step=block)
    tracker.log_metrics({"eval/ppl": 19.5})
    tracker.log_dict({"keys": {"load": "00"}}, "recipe.json")
    tracker.log_text("# Report", "report.md")
    tracker.log_file(note)
    tracker.set_tags({"stage": "done"})
    tracker.finish("FINISHED")
    assert tracker.failures == []

    reader = client(uri)
    run = reader.get_run(tracker.run_id)
    history = reader.get_metric_history(tracker.run_id, "block/mse")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert math.isnan(run.data.metrics["block/seconds"])
    assert run.data.metrics["eval/ppl"] == 19.5
    assert run.data.params == {"quantize.weights.bits": "4", "train": "off"}
    assert (run.data.tags["git"], run.data.tags["stage"]) == ("abc", "done")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "demo")
    artifacts = database.parent / "mlflow-artifacts" / tracker.run_id / "artifacts"
    assert {path.name: path.read_text() for path in artifacts.iterdir() if path.suffix != ".json"} == {
        "report.md": "# Report",
        "note.txt": "small",
    }
    assert tracker.url_hint.endswith(f"#/experiments/{run.info.experiment_id}/runs/{tracker.run_id}")


def test_many_metrics_arrive_all_and_only_once(uri):
    tracker = start(uri)
    for step in range(30):
        tracker.log_metrics({f"scale/{i:02}": i + step for i in range(45)}, step=step)
    tracker.finish("FINISHED")
    assert tracker.failures == []
    run_id = tracker.run_id
    assert all(len(client(uri).get_metric_history(run_id, f"scale/{i:02}")) == 30 for i in (0, 20, 44))


def test_a_failed_run_resumes_under_its_id(uri):
    first = start(uri, params={"seed": 1}, tags={"attempt": "1"})
    first.log_metrics({"block/mse": 1.0}, step=0)
    first.finish("FAILED")
    second = start(uri, run_id=first.run_id, params={"seed": 1, "late": 2}, tags={"attempt": "2"})
    assert client(uri).get_run(first.run_id).info.status == "RUNNING"
    second.log_metrics({"block/mse": 0.5}, step=1)
    second.finish("FINISHED")
    assert second.failures == []
    assert second.run_id == first.run_id
    run = client(uri).get_run(first.run_id)
    assert (run.info.status, run.data.params, run.data.tags["attempt"]) == ("FINISHED", {"seed": "1", "late": "2"}, "2")
    history = client(uri).get_metric_history(first.run_id, "block/mse")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5)]


def test_a_param_that_changed_on_resume_is_reported_and_the_rest_is_logged(uri):
    first = start(uri, params={"seed": 1})
    first.finish("FAILED")
    second = start(uri, run_id=first.run_id, params={"seed": 2, "late": 3})
    second.finish("FINISHED")
    assert len(second.failures) == 1
    assert "param seed was logged as 1 and is now 2" in second.failures[0]
    assert client(uri).get_run(first.run_id).data.params == {"seed": "1", "late": "3"}


@pytest.mark.parametrize("gone", ["never there", "deleted"])
def test_resuming_a_run_that_is_gone_starts_a_new_one_and_says_so(uri, gone):
    run_id = "0" * 32
    if gone == "deleted":
        run_id = start(uri).run_id
        client(uri).delete_run(run_id)
    tracker = start(uri, run_id=run_id, params={"seed": 1})
    tracker.finish("FINISHED")
    assert tracker.run_id not in (None, run_id)
    assert client(uri).get_run(tracker.run_id).data.params == {"seed": "1"}
    assert len(tracker.failures) == 1
    assert run_id in tracker.failures[0]


def test_a_long_param_is_kept_whole_as_an_artifact(uri, database):
    text = "x" * 7000
    tracker = start(uri, params={"data.files": text, "seed": 1})
    again = start(uri, run_id=tracker.run_id, params={"data.files": text, "seed": 1})
    assert tracker.failures == again.failures == []
    assert text in (database.parent / "mlflow-artifacts" / tracker.run_id / "artifacts" / LONG_PARAMS_FILE).read_text()


def test_a_refused_metric_is_reported_and_the_later_ones_are_logged(uri):
    tracker = start(uri)
    tracker.log_metrics({"what?": 1.0} | {f"beside/{i}": 1.0 for i in range(FLUSH_POINTS)})
    tracker.log_metrics({"good": 2.0})
    tracker.finish("FINISHED")
    assert len(tracker.failures) == 2
    assert "what?" in tracker.failures[0]
    assert f"{FLUSH_POINTS + 1} metric values were not logged" in tracker.failures[1]
    assert client(uri).get_run(tracker.run_id).data.metrics == {"good": 2.0}


def test_a_store_that_dies_during_a_run_leaves_failures_and_no_exception(uri, database, tmp_path):
    start(uri).finish("FINISHED")
    copy = tmp_path / "mlflow.db"
    shutil.copy(database, copy)  # creating another one takes seconds
    tracker = start(f"sqlite:///{copy}")
    with sqlite3.connect(copy) as connection:
        connection.execute("DROP TABLE metrics")
        connection.execute("DROP TABLE tags")
    tracker.log_metrics({"block/mse": 1.0})
    tracker.set_tags({"a": "b"})
    tracker.log_file(tmp_path / "nosuch.txt")
    tracker.finish("FINISHED")
    text = "\n".join(tracker.failures)
    for what in ("cannot log metrics", "1 metric values were not logged", "cannot set tags", "nosuch.txt"):
        assert what in text
    assert all("\n" not in failure and len(failure) < 600 for failure in tracker.failures)


def test_an_unreachable_server_is_one_failure_and_costs_little_time(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    began = time.monotonic()
    tracker = start("http://127.0.0.1:9", params={"seed": 1})
    for step in range(1000):
        tracker.log_metrics({"block/mse": 1.0}, step=step)
    tracker.log_text("", "report.md")
    tracker.finish("FAILED")
    assert time.monotonic() - began < 60
    assert tracker.run_id is None
    assert len(tracker.failures) == 1
    assert "http://127.0.0.1:9" in tracker.failures[0]
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9"):
        list_runs("http://127.0.0.1:9", EXPERIMENT)


def test_a_database_that_cannot_be_created_is_a_failure(tmp_path):
    (tmp_path / "occupied").write_text("a file, not a folder")
    tracker = start(f"sqlite:///{tmp_path}/occupied/mlflow.db")
    assert tracker.run_id is None
    assert len(tracker.failures) == 1


def test_a_tracker_that_is_off_accepts_everything():
    tracker = Tracker()
    tracker.log_metrics({"a": 1.0})
    tracker.log_dict({}, "a.json")
    tracker.log_file(Path("nosuch"))
    tracker.finish("FINISHED")
    assert (tracker.run_id, tracker.url_hint, tracker.failures) == (None, "", [])


def test_runs_are_listed_newest_first_with_params_and_last_metrics(uri):
    for seed, status in ((1, "FINISHED"), (2, "FAILED")):
        tracker = start(uri, experiment="listing", params={"seed": seed})
        tracker.log_metrics({"ppl": 10.0}, step=0)
        tracker.log_metrics({"ppl": 9.0 + seed}, step=1)
        tracker.finish(status)
        time.sleep(0.01)  # MLflow orders by milliseconds
    runs = list_runs(uri, "listing")
    assert [(run.params, run.metrics, run.status) for run in runs] == [
        ({"seed": "2"}, {"ppl": 11.0}, "FAILED"),
        ({"seed": "1"}, {"ppl": 10.0}, "FINISHED"),
    ]
    assert runs[0].start >= runs[1].start
    assert runs[0].name == "demo"


def test_listing_an_unknown_experiment_or_database_is_empty_and_creates_nothing(uri, tmp_path):
    assert list_runs(uri, "nosuch") == []
    assert list_runs(f"sqlite:///{tmp_path}/mlflow.db", EXPERIMENT) == []
    assert list(tmp_path.iterdir()) == []


class Mode(Enum):
    STATIC = "static"


def test_flatten_gives_dotted_names_and_plain_values():
    config = {
        "quantize": {"weights": {"bits": 4, "group_size": None}, "mode": Mode.STATIC, "keys": {}},
        "data": {"files": ["a", Path("b")], "window": (1, 2)},
        "lr": 1e-3,
        "train": None,
        "symmetric": True,
        "out": Path("x"),
    }
    assert flatten(config) == {
        "quantize.weights.bits": 4,
        "quantize.weights.group_size": "off",
        "quantize.mode": "static",
        "quantize.keys": "{}",
        "data.files": '["a", "b"]',
        "data.window": "[1, 2]",
        "lr": 1e-3,
        "train": "off",
        "symmetric": "true",
        "out": "x",
    }


FRESH = """
import sys
from prefixquant.pipeline.tracking import Tracker
assert "mlflow" not in sys.modules, "importing the module must not cost the import of mlflow"
tracker = Tracker.start(uri=sys.argv[1], experiment="e", run_name="r", run_id=None, params={"seed": 1}, tags={})
tracker.log_metrics({"a": 1.0})
tracker.finish("FINISHED")
sys.exit("; ".join(tracker.failures) or 0)
"""


def test_two_drivers_on_a_fresh_database_both_log_and_say_nothing(tmp_path):
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", FRESH, uri],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    assert [(driver.communicate()[0], driver.returncode) for driver in drivers] == [("", 0), ("", 0)]
    assert len(list_runs(uri, "e")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_driver_killed_while_creating_the_database_does_not_spoil_it_for_the_next(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    driver = subprocess.Popen([sys.executable, "-c", FRESH, uri])
    fresh = tmp_path / "mlflow.db.new"
    while not (fresh.exists() and fresh.stat().st_size > 100_000):  # tables exist, migrations are under way
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    tracker = start(uri)
    tracker.finish("FINISHED")
    assert tracker.failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
