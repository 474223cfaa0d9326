"""A Ray of several nodes on this machine, in a process of its own with a folder of its own.

Run as a script it holds the cluster and obeys lines on stdin; `Nodes` is that process as the tests see it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from processes import MARK, kill, marked

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds every socket to loopback
    "RAY_AUTH_MODE": "disabled",  # loopback only; otherwise it depends on a token file in the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "OMP_NUM_THREADS": "1",
}
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
"""A dead node is noticed in seconds, a busy one is not taken for dead."""


class Nodes:
    """A head without CPUs and nodes of one CPU each. A context manager; nothing of it is left behind."""

    def __init__(self, count: int, **variables: str) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="pq-", dir="/tmp"))  # short: Ray makes sockets in it
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        # Its own temporary folder also keeps Ray from leaving word of this cluster where others would join it.
        self.environment = clean | ENVIRONMENT | {"RAY_TMPDIR": str(self.folder), MARK: self.mark} | variables
        self._log = (self.folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.nodes: list[int] = []
        self.address = self._ask({"do": "head"})
        for _ in range(count):
            self.add()

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise AssertionError((self.folder / "log").read_text())

    def add(self, **variables: str) -> int:
        """Add a node whose processes have these variables as well, and return its number."""
        self.nodes.append(self._ask({"do": "add", "variables": variables}))
        return self.nodes[-1]

    def remove(self, node: int) -> None:
        """Kill every process of a node."""
        self._ask({"do": "remove", "node": node})
        self.nodes.remove(node)

    def restart_head(self) -> None:
        """Kill the head, which takes the nodes along, and start a new one with as many nodes."""
        count = len(self.nodes)
        self._ask({"do": "end"})
        self.nodes = []
        self.address = self._ask({"do": "head"})
        for _ in range(count):
            self.add()

    def workers(self, title: str = "ray::") -> list[int]:
        """Return the processes that run a task whose title begins so."""
        idle = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        return [pid for pid, line in marked(self.mark).items() if line.startswith(title) and not line.startswith(idle)]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        end = time.monotonic() + 30
        while left := marked(self.mark):
            for pid in left:
                kill(pid)
            assert time.monotonic() < end, left
            time.sleep(0.1)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _hold() -> None:
    """Hold a cluster and obey, one command a line."""
    from ray.cluster_utils import Cluster

    cluster: Any = None
    nodes: dict[int, Any] = {}
    memory = {"object_store_memory": 80 * 2**20}
    for number, line in enumerate(sys.stdin):
        command, answer = json.loads(line), None
        if command["do"] == "head":
            options = {"num_cpus": 0, "_system_config": HEALTH, "include_dashboard": False, **memory}
            cluster = Cluster(initialize_head=True, head_node_args=options)
            answer = cluster.address
        elif command["do"] == "add":
            nodes[number] = cluster.add_node(num_cpus=1, env_vars=command["variables"], **memory)
            answer = number
        elif command["do"] == "remove":
            cluster.remove_node(nodes.pop(command["node"]), allow_graceful=False)
        elif command["do"] == "end":
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            for node in nodes.values():
                cluster.remove_node(node, allow_graceful=False)
            nodes = {}
        print("answer", json.dumps(answer), flush=True)
    if cluster is not None:
        cluster.shutdown()


if __name__ == "__main__":
    _hold()
