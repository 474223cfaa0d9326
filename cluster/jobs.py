"""Jobs of a running Ray cluster, over HTTP: submitted together with this package, followed, listed and stopped."""

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefixquant.cluster.ray_session import first_line
from prefixquant.cluster.shipping import stage_package

_CONNECT_TIMEOUT_S = 10.0
_POLL_S = 1.0
_STOP_WAIT_S = 30
"""What a stopped job has to write down that it was interrupted. Ray's own 3 s are too few on a busy node."""

_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Ray's loggers that report every upload."""


class JobError(Exception):
    """The cluster does not know the job, or refuses what was asked of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """A job to be."""

    job_id: str
    """Unique on the cluster; a second job of the same id is refused."""

    command: tuple[str, ...]
    """Program and arguments. Anyone who may list the cluster's jobs can read them, so they hold no secrets."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> content of files for the folder that the job starts in. Not together with `working_dir`."""

    working_dir: Path | None = None
    """Folder of this machine that is sent along and in which the job and its tasks start; Ray leaves out what the
    folder's .gitignore and .rayignore name."""

    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of the job and its tasks. Ray keeps them with the job and writes them to the nodes' logs in clear."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """Shown with the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the cluster says of a job, its environment aside."""

    job_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    message: str
    """The status in a sentence, and of a failure the end of the log."""

    command: str
    metadata: dict[str, str]
    started: float | None
    """Unix time in seconds."""

    finished: float | None
    exit_code: int | None
    """Of the job's process; negative if a signal ended it."""

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobCluster:
    """The jobs of the cluster whose dashboard answers at an address.

    Raises, here and in every method:
        ConnectionError: nothing answers there, or it wants a token.
        JobError: the address is no dashboard's, the job is unknown, or the cluster refused.
    """

    def __init__(self, address: str) -> None:
        self.address = _check_reachable(address)
        """Of the dashboard, without user name and password."""
        from ray.job_submission import JobSubmissionClient

        for chatty in _CHATTY:  # after the import, which sets their levels
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with self._errors("it has no job server"), _variable("RAY_API_SERVER_ADDRESS", address):
            self._client: Any = JobSubmissionClient(address)  # the variable, or RAY_ADDRESS, would replace the argument

    def submit(self, spec: JobSpec) -> None:
        """Send the package and the job's files, and start the job with the package importable in all its processes."""
        assert not (spec.files and spec.working_dir), "either files or a folder"
        with tempfile.TemporaryDirectory() as scratch:
            package = Path(scratch) / "package"
            runtime_env: dict[str, Any] = {
                "py_modules": [str(path) for path in stage_package(package)],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **spec.env},
            }
            if spec.files:
                folder = Path(scratch) / "files"
                folder.mkdir()
                for name, content in spec.files.items():
                    (folder / name).write_bytes(content)
                runtime_env["working_dir"] = str(folder)
            elif spec.working_dir is not None:
                runtime_env["working_dir"] = str(spec.working_dir)
            with self._errors(f"job {spec.job_id} cannot be submitted"):
                self._client.submit_job(
                    entrypoint=shlex.join(spec.command),
                    submission_id=spec.job_id,
                    runtime_env=runtime_env,
                    metadata=dict(spec.metadata),
                )

    def get(self, job_id: str) -> Job:
        """Return a job."""
        with self._errors(f"job {job_id} cannot be looked up; `prefixquant job list` names those there are"):
            return _job(self._client.get_job_info(job_id))

    def list(self) -> list[Job]:
        """Return the submitted jobs that the cluster remembers, the oldest first."""
        with self._errors("jobs cannot be listed"):
            jobs = [_job(each) for each in self._client.list_jobs() if each.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0.0)

    def stop(self, job_id: str) -> Job:
        """Interrupt a job and return it once it has ended; one that has ended before is left as it is."""
        with self._errors(f"job {job_id} cannot be stopped"):
            self._client.stop_job(job_id)
        end = time.monotonic() + _STOP_WAIT_S + 30
        while not (job := self.get(job_id)).ended:
            if time.monotonic() > end:
                raise JobError(f"job {job_id} is still {job.status} long after it was told to stop; look at the nodes")
            time.sleep(_POLL_S)
        return job

    def logs(self, job_id: str) -> str:
        """Return what the job has printed, stdout and stderr together."""
        with self._errors(f"the log of job {job_id} cannot be read"):
            logs: str = self._client.get_job_logs(job_id)
            return logs

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Write the job's log, from its beginning and as it grows, and return the job once it has ended.

        A broken connection is made again. KeyboardInterrupt ends the following, not the job.
        """
        written = 0

        async def tail() -> None:  # each stream begins with the log's first character
            nonlocal written
            seen = 0
            async for text in self._client.tail_job_logs(job_id):
                write(text[max(0, written - seen) :])
                seen += len(text)
                written = max(written, seen)

        while not (job := self.get(job_id)).ended:
            with contextlib.suppress(RuntimeError, OSError):  # the connection broke; `get` says if it is for good
                asyncio.run(tail())
            time.sleep(_POLL_S)
        write(self.logs(job_id)[written:])
        return job

    @contextlib.contextmanager
    def _errors(self, problem: str) -> Iterator[None]:
        """Turn what Ray's client raises into the errors of this class."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as err:
            raise ConnectionError(
                f"the cluster at {self.address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
                f"(or RAY_AUTH_TOKEN_PATH) here"
            ) from err
        except OSError as err:  # requests' errors are OSErrors as well
            raise ConnectionError(f"the cluster at {self.address} does not answer: {first_line(err)}") from err
        except (RuntimeError, ValueError) as err:
            lines = [line.strip() for line in str(err).splitlines() if line.strip(" .")]
            reason = lines[-1] if lines else type(err).__name__  # the server may answer with a traceback
            raise JobError(f"{problem} ({self.address}: {reason})") from err


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for the time of the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _check_reachable(address: str) -> str:
    """Return a dashboard's address without user name and password once something listens there."""
    place = urlsplit(address)
    shown = f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}".rstrip("/")
    if place.scheme not in ("http", "https") or place.hostname is None:
        raise JobError(
            f"jobs go to the dashboard of a cluster, as in http://HEAD:8265, got {address!r}; "
            f"host:port and ray:// are for `prefixquant run --address`"
        )
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as err:
        raise ConnectionError(
            f"no Ray dashboard answers at {shown} ({err}); check host and port, or forward the port here "
            f"(`kubectl port-forward service/NAME-head-svc 8265`, `ray dashboard cluster.yaml`)"
        ) from err
    return shown


def _job(details: Any) -> Job:
    """Return Ray's record of a job as ours."""
    return Job(
        job_id=details.submission_id or details.job_id,
        status=details.status.value,
        message=details.message or "",
        command=details.entrypoint,
        metadata=details.metadata or {},
        started=details.start_time / 1000 if details.start_time else None,
        finished=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
    )
