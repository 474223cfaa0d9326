"""A Ray cluster to run functions on: started here, found running, or joined at an address."""

import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from prefixquant.cluster.mailbox import Mailbox, start_mailbox

_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds every socket to loopback; _node_ip_address does not
    "RAY_AUTH_MODE": "disabled",  # loopback only; otherwise it depends on a token file in the home folder
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # ours dies with this process; Ray's agent would wait 60 s for it
}
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` every worker would build an environment of its own
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning
    "RAY_task_oom_retries": "2",  # by default a task that Ray kills for memory is tried again for ever
    "MLFLOW_DISABLE_TELEMETRY": "true",  # its thread changes os.environ under ours
}
_MAX_RETRIES = 2  # of a task whose worker or node died, or which raised OSError
_CONNECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 60.0  # for a worker to start and import torch

DISK = "disk_gb"
"""Ray resource of a node: free gigabytes of its local disk. `ray start --resources '{"disk_gb": 1000}'`."""

Ref = Any
"""A task under way (ray.ObjectRef)."""


class TaskLostError(Exception):
    """A task was lost with its worker or node, was killed for memory, or was cancelled; it raised nothing itself."""


def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_bytes: int = 200 * 2**20,
    gpu_bytes: int | None = None,
) -> "RaySession":
    """Return a session on a Ray cluster; use it as a context manager.

    Args:
        address: of a running cluster (`auto`, `host:port`, `ray://...`). None: the cluster this process is connected
            to, or the one of the Ray job this runs in (RAY_ADDRESS), or a new one on this machine.
        num_cpus: of a new cluster; None: all cores.
        num_gpus: of a new cluster; None: all that are visible.
        object_store_bytes: of a new cluster. Small: tensors travel through the artifact store.
        gpu_bytes: memory of a GPU; None: one is asked when it matters.
    Raises:
        ConnectionError: there is no cluster at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address:
        _check_reachable(address)
    for name, value in (_ENVIRONMENT if address else _ENVIRONMENT | _LOCAL_ENVIRONMENT).items():
        os.environ.setdefault(name, value)  # before the import: Ray reads some of them only then

    import ray

    if ray.is_initialized():
        return RaySession(owned=False, gpu_bytes=gpu_bytes)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address:
        del quiet["include_dashboard"]  # belongs to whoever starts the cluster
        ray.init(address=address, **quiet)
    else:
        disk = {DISK: shutil.disk_usage(tempfile.gettempdir()).free // 10**9}
        resources = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": disk}
        ray.init(object_store_memory=object_store_bytes, **resources, **quiet)
    return RaySession(owned=True, gpu_bytes=gpu_bytes)


class RaySession:
    """Runs functions on the cluster this process is connected to. On exit it ends what `connect` began, no more."""

    def __init__(self, *, owned: bool, gpu_bytes: int | None = None) -> None:
        import ray

        self._ray = ray
        self._gpu: tuple[str, int] | None = None if gpu_bytes is None else ("", gpu_bytes)
        self._asked_gpu = gpu_bytes is not None
        self._owned = owned
        self._remotes: dict[tuple[Callable[..., Any], bool], Any] = {}
        self._box: Any = None
        self.device: str | None = None
        """Where tasks compute: Ray says, each time."""
        self._nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.cpus = int(sum(node.get("CPU", 0) for node in self._nodes))
        """Cores of the whole cluster."""
        self.gpus = int(sum(node.get("GPU", 0) for node in self._nodes))
        """GPUs of the whole cluster."""

    @property
    def workers(self) -> int:
        """How many tasks of one GPU, or without GPUs of one core, run at the same time."""
        return max(1, self.gpus or self.cpus)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, which ends a cluster started by `connect`. One that was there before stays."""
        if self._box is not None:
            box, self._box = self._box, None
            self._ray.kill(box)
        if self._owned:
            self._owned = False
            self._ray.shutdown()

    def fit(self, cpus: int, gpus: float) -> tuple[int, float]:
        """Return the request cut to what one node has, as of `connect`; one that fits no node would wait for ever."""
        gpus = min(gpus, max((node.get("GPU", 0.0) for node in self._nodes), default=0.0))
        most = max((int(node.get("CPU", 0)) for node in self._nodes if node.get("GPU", 0) >= gpus), default=0)
        return min(cpus, most) if most else cpus, gpus

    def gpu(self) -> tuple[str, int] | None:
        """Return name and memory in bytes of a GPU of the cluster, where they are alike; None if nobody knows."""
        if not self._asked_gpu and self.gpus:
            self._asked_gpu = True
            probe = self._ray.remote(num_cpus=0, num_gpus=0.01, max_calls=1)(_look_at_gpu).remote()
            if self.wait([probe], timeout=_PROBE_TIMEOUT_S):
                self._gpu = self.result(probe)
            else:
                self.cancel([probe])  # all are taken by others
        return self._gpu

    def fit_bytes(self, memory: int, disk: int) -> dict[str, Any]:
        """Return Ray's options that ask for so many bytes of a node's memory and local disk.

        They are cut to what the largest node has. Disk is asked for where nodes declare it (`disk_gb`).
        """
        most_memory = max((node.get("memory", 0.0) for node in self._nodes), default=0.0)
        most_disk = max((node.get(DISK, 0.0) for node in self._nodes), default=0.0)
        options: dict[str, Any] = {}
        if memory and most_memory:
            options["memory"] = min(memory, int(most_memory))
        if disk and most_disk:
            options["resources"] = {DISK: min(max(1, disk // 10**9), int(most_disk))}
        return options

    def submit(
        self,
        function: Callable[..., Any],
        *args: Any,
        name: str,
        cpus: int = 1,
        gpus: float = 0,
        memory: int = 0,
        disk: int = 0,
    ) -> Ref:
        """Start `function(*args)` and return a handle for `wait`, `result` and `cancel`.

        It is tried again up to twice if its worker or node dies or it raises OSError, and for no other reason.
        Cores, GPUs, and bytes of host memory and local disk are cut to what the cluster has.
        """
        cpus, gpus = self.fit(cpus, gpus)
        # CUDA_VISIBLE_DEVICES is read once a process: where there are several GPUs, a worker serves one task only.
        once = gpus > 0 and self.gpus > 1
        remote = self._remotes.get((function, once))
        if remote is None:
            options = {"max_retries": _MAX_RETRIES, "retry_exceptions": [OSError], "max_calls": int(once)}
            remote = self._remotes[function, once] = self._ray.remote(**options)(function)
        return remote.options(name=name, num_cpus=cpus, num_gpus=gpus, **self.fit_bytes(memory, disk)).remote(*args)

    def submit_group(
        self, function: Callable[..., Any], *args: Any, name: str, ranks: int, cpus: float = 1, gpus: float = 0
    ) -> Ref:
        """Start `function(member, *args)` on a group of `ranks` processes, as `worker_group.run_group` describes.

        The handle is as that of `submit`; the result is that of rank 0. `cpus` and `gpus` are of each rank. What the
        cluster does not have is an error (ResourceError).
        """
        from prefixquant.cluster.worker_group import run_group

        # The group sees to its own restarts; the retries are for the death of the process that watches over it.
        remote = self._ray.remote(num_cpus=0, max_retries=_MAX_RETRIES, retry_exceptions=False)(run_group)
        return remote.options(name=name).remote(function, args, ranks=ranks, cpus=cpus, gpus=gpus, name=name)

    def mailbox(self) -> Mailbox:
        """Return where workers can put messages for `messages`; pass it to them as an argument."""
        if self._box is None:
            self._box = start_mailbox()
        return Mailbox(self._box)

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived since the last call, those of one worker in its order."""
        if self._box is None:
            return []
        try:
            return self._ray.get(self._box.take.remote())
        except self._ray.exceptions.RayError:
            return []  # its process died with what it held; Ray starts it again

    def wait(self, refs: Sequence[Ref], timeout: float | None = None) -> list[Ref]:
        """Return those of `refs` that have ended, as soon as there is one; none after `timeout` seconds."""
        ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=timeout)
        return ready

    def result(self, ref: Ref) -> Any:
        """Return what the function returned, or raise what it raised, chained to the worker's traceback.

        Raises TaskLostError if it came to no end of its own.
        """
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as err:
            if isinstance(err.cause, exceptions.TaskCancelledError):  # raised by a call of Ray inside the function
                raise TaskLostError(f"{type(err.cause).__name__}: {first_line(err.cause)}") from err
            raise err.cause from err
        except exceptions.OutOfMemoryError as err:
            raise TaskLostError(f"Ray killed it for memory: {first_line(err)}") from err
        except exceptions.RayError as err:
            raise TaskLostError(f"{type(err).__name__}: {first_line(err)}") from err

    def cancel(self, refs: Sequence[Ref]) -> None:
        """Interrupt the tasks that are under way and forget those that wait. What they have published stays."""
        for ref in refs:
            self._ray.cancel(ref, force=False)

    def abandon(self, refs: Sequence[Ref]) -> None:
        """Wait no longer for the tasks, which end with the connection at the latest.

        Ray aborts this process if a cancelled task happens to end at that moment, so tasks are cancelled only where
        nothing else would end them: in a Ray that was there before `connect` and stays.
        """
        if not self._owned:
            self.cancel(refs)


def _check_reachable(address: str) -> None:
    """Raise ConnectionError if nothing listens at host and port; Ray would keep trying for minutes."""
    place = re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address)
    if place is None:
        return  # `auto` and the like: Ray finds the place
    try:
        socket.create_connection((place[1], int(place[2])), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as err:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({err}); check the address, or start one with `ray start --head`"
        ) from err


def _look_at_gpu() -> tuple[str, int] | None:
    """Return name and memory of the GPU that this task was given; None if torch does not see it."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory


def assigned_gpus() -> list[str]:
    """Return the ids of the GPUs that the current Ray task was given; none outside of one."""
    import ray

    if not ray.is_initialized():
        return []
    return [str(gpu) for gpu in ray.get_gpu_ids()]


def first_line(err: BaseException) -> str:
    """Return the first line of an error's message that says anything."""
    return next((line.strip() for line in str(err).splitlines() if line.strip()), "no message")
