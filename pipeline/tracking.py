"""MLflow: one run a pipeline run. The only module that imports mlflow, and only inside functions: it takes seconds.

Tracking must never cost a result, so a `Tracker` does not raise: what went wrong is in `failures`, to be shown at the
end of the run. It is meant for one thread of one process, the driver.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from prefixquant.cluster.refusals import without_secrets

Scalar = int | float | str

FLUSH_POINTS = 200
FLUSH_S = 5.0
RETRY_S = 60.0
"""Seconds a failed flush waits for its next attempt: a dead server then costs little of a run."""

LONG_PARAMS_FILE = "long_params.json"
_MAX_PARAM_CHARS = 6000  # MLflow silently cuts longer values
_MAX_METRICS_PER_CALL = 1000
_MAX_PARAMS_PER_CALL = 100


class TrackingError(Exception):
    """The tracking store cannot be read."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One tracked run as MLflow holds it."""

    run_id: str
    """MLflow's id."""

    name: str

    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""

    start: datetime
    """UTC."""

    params: dict[str, str]

    metrics: dict[str, float]
    """The last value of each metric."""


class Tracker:
    """Logs one run to MLflow. No method raises; `failures` says in words what could not be logged."""

    def __init__(self) -> None:
        """A tracker that is off: every call does nothing."""
        self.failures: list[str] = []
        self.run_id: str | None = None
        self.url_hint: str = ""
        self._uri = ""
        self._client: Any = None
        self._points: list[tuple[str, float, int, int]] = []  # name, value, milliseconds since the epoch, step
        self._num_refused = 0
        self._next_flush = 0.0

    @classmethod
    def start(
        cls,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> "Tracker":
        """Return a tracker of a new MLflow run or, given its `run_id`, of an earlier one that goes on.

        Args:
            uri: tracking store: `sqlite:////absolute/path.db` or a server's URL.
            experiment: created if missing; beside a SQLite file its artifacts go to `mlflow-artifacts/`.
            run_name: shown in MLflow's table.
            run_id: MLflow's id of the run to resume. One the store no longer knows starts a new run.
            params: flat, see `flatten`. A resumed run keeps its old values; a differing one becomes a failure.
            tags: replace earlier ones of the same name.
        Returns:
            The tracker; if the store cannot be reached it is off and `failures` says why.
        """
        tracker = cls()
        tracker._uri = uri
        with tracker._collecting("start a run"):
            client = _connect(uri)
            experiment_id = _experiment_id(client, uri, experiment)
            run = tracker._find_run(client, run_id) if run_id is not None else None
            if run is None:
                run = client.create_run(experiment_id, run_name=run_name)
            else:
                client.update_run(run.info.run_id, status="RUNNING")
            tracker._client, tracker.run_id = client, run.info.run_id
            link = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
            is_server = uri.startswith(("http://", "https://"))
            page = f"{uri.rstrip('/')}/" if is_server else f"mlflow ui --backend-store-uri {uri}, then "
            tracker.url_hint = without_secrets(f"{page}{link}")
            tracker._next_flush = time.monotonic() + FLUSH_S
            tracker._log_params(params, run.data.params)
            tracker.set_tags(tags)
        return tracker

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Buffer the values, at `step` (0 if None). A resumed run should log new steps only: MLflow appends."""
        if self._client is None:
            return
        now_ms = time.time_ns() // 1_000_000
        with self._collecting("log metrics"):
            self._points += [(name, float(value), now_ms, step or 0) for name, value in metrics.items()]
        if len(self._points) >= FLUSH_POINTS or time.monotonic() >= self._next_flush:
            self._flush()

    def steps(self, metric: str) -> set[int]:
        """Return the steps at which the run has a value of the metric, sent or buffered; none if off or unreadable."""
        steps = {step for name, _, _, step in self._points if name == metric}
        if self._client is not None:
            with self._collecting(f"read the metric {metric}"):
                steps |= {point.step for point in self._client.get_metric_history(self.run_id, metric)}
        return steps

    def log_dict(self, record: Mapping[str, Any], name: str) -> None:
        """Store the record as the run's artifact `name`: JSON, or YAML if the name ends so."""
        if self._client is not None:
            with self._collecting(f"store {name}"):
                self._client.log_dict(self.run_id, dict(record), name)

    def log_text(self, text: str, name: str) -> None:
        """Store the text as the run's artifact `name`."""
        if self._client is not None:
            with self._collecting(f"store {name}"):
                self._client.log_text(self.run_id, text, name)

    def log_file(self, path: Path) -> None:
        """Store a small file as the run's artifact under its own name."""
        if self._client is not None:
            with self._collecting(f"store {path}"):
                self._client.log_artifact(self.run_id, str(path))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set the run's tags; values beyond 8000 characters are cut by MLflow."""
        if self._client is not None:
            from mlflow.entities import RunTag

            for batch in _batches([RunTag(name, str(value)) for name, value in tags.items()], _MAX_PARAMS_PER_CALL):
                with self._collecting("set tags"):
                    self._client.log_batch(self.run_id, tags=batch)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Write what is buffered and close the run. Later calls do nothing."""
        if self._client is None:
            return
        self._flush()
        if num_lost := len(self._points) + self._num_refused:
            self._fail(f"{num_lost} metric values were not logged")
        with self._collecting(f"mark the run {status}"):
            self._client.set_terminated(self.run_id, status)
        self._client, self._points = None, []

    def _find_run(self, client: Any, run_id: str) -> Any | None:
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
        except MlflowException as err:
            if err.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            self._fail(f"the run {run_id} to go on with is gone; a new one was started")
            return None
        return run

    def _log_params(self, params: Mapping[str, Any], logged: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        texts = {name: str(value) for name, value in params.items()}
        short = {name: text[:_MAX_PARAM_CHARS] for name, text in texts.items()}
        changed = {name: text for name, text in short.items() if logged.get(name, text) != text}
        for name, text in changed.items():
            self._fail(f"param {name} was logged as {_brief(logged[name])} and is now {_brief(text)}; the first stays")
        fresh = [Param(name, text) for name, text in short.items() if name not in logged]
        for batch in _batches(fresh, _MAX_PARAMS_PER_CALL):
            with self._collecting("log params"):
                self._client.log_batch(self.run_id, params=batch)
        long = {name: text for name, text in texts.items() if len(text) > _MAX_PARAM_CHARS}
        if long:
            self.log_dict(long, LONG_PARAMS_FILE)

    def _flush(self) -> None:
        from mlflow.entities import Metric

        self._next_flush = time.monotonic() + RETRY_S
        while self._points:
            batch = self._points[:_MAX_METRICS_PER_CALL]
            try:
                self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            except Exception as err:
                self._fail("cannot log metrics", err)
                if getattr(err, "error_code", None) != "INVALID_PARAMETER_VALUE":
                    return  # kept for the next attempt
                self._num_refused += len(batch)
            del self._points[: len(batch)]
        self._next_flush = time.monotonic() + FLUSH_S

    @contextmanager
    def _collecting(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # database, network and client errors share no base, and none may end a run
            self._fail(f"cannot {action}", err)

    def _fail(self, what: str, err: Exception | None = None) -> None:
        reason = f": {type(err).__name__}: {_brief(str(err), 300)}" if err is not None else ""
        message = without_secrets(f"MLflow at {self._uri}: {what}{reason}")
        if message not in self.failures:
            self.failures.append(message)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return the nested config as one level of dotted names with plain values, ready to be params.

    None becomes "off", so that every run has the same names; a list, and a mapping without entries, becomes JSON text.
    """
    flat: dict[str, Scalar] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _plain(value)
    return flat


def list_runs(uri: str, experiment: str) -> list[RunSummary]:
    """Return the experiment's runs, newest first; none if there is no such experiment. Raises TrackingError."""
    database = _sqlite_file(uri)
    if database is not None and not database.exists():
        return []
    try:
        client = _connect(uri)
        found = client.get_experiment_by_name(experiment)
        runs, token = [], None
        while found is not None:
            page = client.search_runs([found.experiment_id], order_by=["start_time DESC"], page_token=token)
            runs += page
            if not (token := page.token):
                break
    except Exception as err:  # as above: no common base, and here the caller asked for an answer
        message = f"MLflow at {uri} cannot be read: {type(err).__name__}: {_brief(str(err), 300)}"
        raise TrackingError(without_secrets(message)) from err
    return [
        RunSummary(
            run_id=run.info.run_id,
            name=run.info.run_name or "",
            status=run.info.status,
            start=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
        )
        for run in runs
    ]


def _connect(uri: str) -> Any:
    # Telemetry races with other threads over os.environ; the default of 7 retries would hold a run up for minutes.
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # the creation of the tables is told line by line
        logging.getLogger(noisy).setLevel(logging.WARNING)
    database = _sqlite_file(uri)
    if database is not None and not database.exists():
        _create_tables(database)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment_id(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = _sqlite_file(uri)
        # Without a location MLflow would put the files below the current directory.
        location = (database.parent / "mlflow-artifacts").absolute().as_uri() if database is not None else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as err:
            if err.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # another run created it in between
    return str(found.experiment_id)


def _create_tables(database: Path) -> None:
    """Create the SQLite file with MLflow's tables, whole or not at all; one that exists stays as it is.

    Left to itself MLflow spends seconds on it, one of two processes at it fails, and if it is interrupted, no later
    process can use the file. So it works on another name, alone.
    """
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if database.exists():
            return
        fresh = Path(f"{database}.new")
        for leftover in (fresh, Path(f"{fresh}-journal")):
            leftover.unlink(missing_ok=True)
        MlflowClient(tracking_uri=f"sqlite:///{fresh}").search_experiments(max_results=1)
        fresh.rename(database)


def _sqlite_file(uri: str) -> Path | None:
    scheme = "sqlite:///"
    return Path(uri.removeprefix(scheme).partition("?")[0]) if uri.startswith(scheme) else None


def _plain(value: Any) -> Scalar:
    if value is None:
        return "off"
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, bool | list | tuple | Mapping):
        return json.dumps(value, default=str)
    return value if isinstance(value, int | float | str) else str(value)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _brief(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."
