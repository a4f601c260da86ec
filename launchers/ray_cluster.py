"""Ray underneath a run: started on this machine for the run alone, or a cluster that is there already.

Never calls `ray stop`, which ends every Ray process of a machine, whosever it is.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from moesys.errors import LaunchError
from moesys.launchers.address import host_and_port

CONNECT_S = 5.0


@dataclass(frozen=True)
class Node:
    """A living node of a Ray cluster and its logical resources."""

    id: str
    address: str
    cpus: float
    gpus: int
    free: bool
    """Whether nothing of these is in use."""


def find_address(configured: str | None, env: Mapping[str, str] | None = None) -> str | None:
    """The cluster to use: `launch.ray_address`, else the one this process was submitted to, else None."""
    env = os.environ if env is None else env
    if configured is not None:
        return configured
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in env
    return env.get("RAY_ADDRESS") or ("auto" if inside_job else None)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for a while; Ray reads its settings from there, also while imported."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


class EmbeddedRay:
    """Ray started on this machine, in a folder of its own, with one logical CPU per worker."""

    where = "this machine"
    single_machine = True

    def __init__(self, world: int):
        self.world = world
        # Not under $TMPDIR: the paths of Unix sockets inside must stay below 107 characters.
        self._folder = tempfile.mkdtemp(prefix="moesys-", dir="/tmp")

    def start(self, job_env: Mapping[str, str]) -> None:
        """Start Ray; `job_env` is meant for its processes and inherited by them."""
        preload = threading.Thread(target=import_slow_libraries, daemon=True)
        preload.start()
        try:
            ray.init(
                address="local",
                num_cpus=self.world,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=self._folder,
            )
        except Exception as error:
            self.stop()
            raise LaunchError(f"Ray could not be started on this machine: {error}") from error
        preload.join()
        silence_driver()

    def keep_logs(self, folder: Path) -> None:
        """Copy the logs of Ray's own processes to `folder`, for errors that are not a worker's."""
        shutil.copytree(f"{self._folder}/session_latest/logs", folder, dirs_exist_ok=True)

    def stop(self) -> None:
        """End Ray's processes, the workers among them, and remove their folder."""
        ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


class ExistingRay:
    """A running cluster, joined as one of its jobs; stopping leaves the cluster as it was."""

    def __init__(self, address: str):
        self.address = address
        self.single_machine = False
        self.where = f"the Ray cluster at {address}"

    def start(self, job_env: Mapping[str, str]) -> None:
        """Connect; `job_env` reaches every process that Ray starts for this job.

        Raises `LaunchError` where no cluster answers, or this machine is not one of its nodes.
        """
        check_reachable(self.address)
        try:
            ray.init(
                address=self.address,
                runtime_env={"env_vars": dict(job_env)},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            raise LaunchError(
                f"could not join {self.where}: {error}\n    remedy: run this command on a node of the cluster, "
                "with the same versions of Python and Ray, or submit it with `ray job submit`"
            ) from error
        silence_driver()

    def keep_logs(self, folder: Path) -> None:
        """Nothing to do: the cluster keeps its logs."""

    def stop(self) -> None:
        """Leave the cluster; it then ends this job's workers."""
        ray.shutdown()


def silence_driver() -> None:
    """Keep Ray from printing every worker's death and its advice between ours; there is no public switch."""
    ray._private.worker._worker_logs_enabled = False


def import_slow_libraries() -> None:
    """Import what Ray Train needs and Ray does not, while Ray waits for its processes to start."""
    import pandas  # noqa: F401
    import torch  # noqa: F401


def check_reachable(address: str) -> None:
    """Raise `LaunchError` if nothing answers at `address` (HOST:PORT); Ray itself would try for a minute."""
    if address.startswith("ray://"):
        raise LaunchError(
            f"{address} is an address of Ray Client, which Ray Train does not work through"
            "\n    remedy: give HOST:PORT of the head node (usually port 6379), or use `ray job submit`"
        )
    parts = host_and_port(address)
    if parts is None:
        if ":" not in address:
            return  # "auto" and the like, which Ray resolves by itself
        remedy = "give HOST:PORT of the head node, an IPv6 address in brackets: [::1]:6379"
        raise LaunchError(f"{address!r} is no address of a Ray cluster\n    remedy: {remedy}")
    try:
        socket.create_connection(parts, CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:  # ports above 65535; names that are none
        remedy = "\n    remedy: check launch.ray_address, or leave it out to start Ray on this machine"
        raise LaunchError(f"no Ray cluster answers at {address}: {error}{remedy}") from error


def living_nodes() -> list[Node]:
    """The nodes of the connected cluster in the order of their addresses."""
    available = available_resources_per_node()
    nodes = [as_node(node, available.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (int(ipaddress.ip_address(node.address)), node.id))


def as_node(node: dict[str, Any], available: Mapping[str, float]) -> Node:
    """From an entry of `ray.nodes()` and what of its resources is not in use."""
    total = {key: node["Resources"].get(key, 0.0) for key in ("CPU", "GPU")}
    free = all(available.get(key, 0.0) >= amount for key, amount in total.items())
    return Node(node["NodeID"], node["NodeManagerAddress"], total["CPU"], int(total["GPU"]), free)
