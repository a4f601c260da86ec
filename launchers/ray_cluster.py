"""The Ray under a run: started on this machine for the run alone, or an existing cluster.

Nothing here calls `ray stop`, which ends every Ray process of a machine, those of other users too.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import shutil
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.state import available_resources_per_node
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from moesys.errors import LaunchError
from moesys.launchers.address import host_and_port
from moesys.leftovers import OwnedResources

CONNECT_S = 5.0

ATTEMPTS = 3
"""Starts of Ray on this machine, at most: it gives its processes 30 seconds, which a busy machine exceeds."""

TOKEN = secrets.token_hex(32)
"""The token of every embedded Ray of this process: Ray keeps the first that it reads."""


@dataclass(frozen=True)
class Node:
    """A living node of a Ray cluster and its logical resources."""

    id: str
    address: str
    cpus: float
    gpus: int
    free: bool
    """True if none of its resources is in use."""


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process for a while, or remove those that are None; Ray reads its settings from there."""
    before = {key: os.environ.get(key) for key in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for key, value in variables.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Append to `log` what this process prints meanwhile, from C++ as well.

    Ray asks its users to report what it prints there. Its exceptions are enough for ours.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    shown = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for descriptor in shown:
            os.dup2(file, descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.close(file)
        for descriptor, before in shown.items():
            os.dup2(before, descriptor)
            os.close(before)
        if not log.stat().st_size:
            log.unlink()


@contextmanager
def deaths_to(log: Path) -> Iterator[None]:
    """Append to `log` the exceptions that end threads of this process: Ray's threads die when their peer is gone."""
    before = threading.excepthook

    def append(death: threading.ExceptHookArgs) -> None:
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8", errors="replace") as file:
                traceback.print_exception(death.exc_type, death.exc_value, death.exc_traceback, file=file)

    threading.excepthook = append
    try:
        yield
    finally:
        threading.excepthook = before


class EmbeddedRay:
    """Ray started on this machine, with one logical CPU per worker, its files in the folder of `owned`.

    Nobody else can use it: the folder is private to this user, and Ray's processes listen on the loopback interface and
    serve only callers with a token that is made for them and written nowhere.
    """

    where = "this machine"
    single_machine = True

    def __init__(self, world: int, owned: OwnedResources):
        self.world, self._owned = world, owned
        self._closing = ExitStack()

    def start(self, job_env: Mapping[str, str]) -> None:
        """Start Ray; `job_env` is meant for its processes and inherited by them."""
        # Ray enables its tokens by default unless RAY_AUTH_MODE is set. The last variable turns multi-node clusters
        # off: Ray then serves one machine, and stays on loopback.
        private = {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": TOKEN, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
        self._closing.enter_context(environment(self._owned.environment | private))
        self._closing.enter_context(on_loopback())
        AuthenticationTokenLoader.instance().reset_cache()
        preload = threading.Thread(target=import_slow_libraries, daemon=True)
        preload.start()
        try:
            self._init()
        except Exception as error:
            self.stop()
            raise LaunchError(
                f"Ray could not be started on this machine: {first_sentence(error)}\n    remedy: try again when the "
                "machine has less to do, or look into logs/ray in the run's folder; --launcher local needs no Ray"
            ) from error
        preload.join()
        silence_driver()

    def _init(self) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                ray.init(
                    address="local",
                    num_cpus=self.world,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    _temp_dir=str(self._owned.path),
                )
                return
            except Exception as error:
                if attempt == ATTEMPTS or "timed out" not in str(error):
                    raise
                ray.shutdown()
                self._owned.end_processes()

    def keep_logs(self, folder: Path) -> None:
        """Copy the logs of Ray's own processes to `folder`, for errors that are not a worker's."""
        logs = self._owned.path / "session_latest" / "logs"
        if logs.is_dir():
            shutil.copytree(logs, folder, dirs_exist_ok=True, ignore_dangling_symlinks=True)
            folder.chmod(0o700)

    def stop(self) -> None:
        """End Ray's processes, the workers among them."""
        ray.shutdown()
        self._closing.close()


@contextmanager
def on_loopback() -> Iterator[None]:
    """Make a Ray that starts inside take 127.0.0.1 for this machine's address, and listen there alone.

    Its variable for that was read when Ray was imported, which may have been before; `_node_ip_address` of
    `ray.init` would not do, as Ray replaces a loopback address.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


class ExistingRay:
    """A running cluster, joined as one of its jobs; stopping leaves the cluster as it was."""

    def __init__(self, address: str):
        self.address = address
        self.single_machine = False
        self.where = f"the Ray cluster at {address}"

    def start(self, job_env: Mapping[str, str]) -> None:
        """Connect; `job_env` reaches every process that Ray starts for this job.

        Raises `LaunchError` if no cluster answers, or this machine is not one of its nodes.
        """
        check_reachable(self.address)
        authenticate(self.address)
        try:
            ray.init(
                address=self.address,
                runtime_env={"env_vars": dict(job_env)},
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except Exception as error:
            raise LaunchError(
                f"could not join {self.where}: {first_sentence(error)}\n    remedy: run this command on a node of the "
                "cluster, with the same versions of Python and Ray, or submit it with `ray job submit`"
            ) from error
        silence_driver()

    def keep_logs(self, folder: Path) -> None:
        """Do nothing: the cluster keeps its logs."""

    def stop(self) -> None:
        """Leave the cluster; it then ends this job's workers."""
        ray.shutdown()


def authenticate(address: str) -> None:
    """Show the cluster at HOST:PORT the token that it asks for, if it asks for one and this user has it.

    A Ray started by `ray start` asks for one if its user had one already. Ray itself would try twenty times, and then
    report another error.

    Raises:
        LaunchError: the cluster does not accept what this user has.
    """
    if not address.rpartition(":")[2].isdigit() or _accepts_us(address):
        return
    # Ray calls this private function when it starts a cluster, but not when it joins one.
    with suppress(AuthenticationError):  # RAY_AUTH_TOKEN_PATH names no file
        if maybe_enable_token_auth_if_token_available(warn_if_disabled=False) and _accepts_us(address):
            return
    mode = os.environ.get("RAY_AUTH_MODE")
    wrong = (
        "and the one that is set here is another's" if mode == "token" else f"and RAY_AUTH_MODE is {mode or 'not set'}"
    )
    raise LaunchError(
        f"the Ray cluster at {address} asks for a token, {wrong}\n    remedy: export RAY_AUTH_MODE=token, with the "
        "cluster's token in RAY_AUTH_TOKEN or in ~/.ray/auth_token (`ray get-auth-token` on its head prints it)"
    )


def _accepts_us(address: str) -> bool:
    try:
        GcsClient(address=address)
    except AuthenticationError:
        return False
    except Exception:
        return True  # something else is wrong, which `ray.init` will say
    return True


def first_sentence(error: BaseException) -> str:
    """The first line of Ray's message, without its advice to report it."""
    lines = [line for line in str(error).strip().splitlines() if "github.com" not in line and line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def silence_driver() -> None:
    """Keep Ray from printing every worker's death and its advice; there is no public switch."""
    ray._private.worker._worker_logs_enabled = False


def import_slow_libraries() -> None:
    """Import what Ray Train needs and Ray does not, while Ray waits for its processes to start."""
    import pandas  # noqa: F401
    import torch  # noqa: F401


def check_reachable(address: str) -> None:
    """Raise `LaunchError` if nothing answers at `address` (HOST:PORT). Ray itself would try for a minute."""
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
        raise LaunchError(f"{address!r} is not the address of a Ray cluster\n    remedy: {remedy}")
    try:
        socket.create_connection(parts, CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:  # ports above 65535; invalid names
        remedy = "\n    remedy: check launch.ray_address, or leave it out to start Ray on this machine"
        raise LaunchError(f"no Ray cluster answers at {address}: {error}{remedy}") from error


def living_nodes() -> list[Node]:
    """The nodes of the connected cluster in the order of their addresses."""
    available = available_resources_per_node()
    nodes = [as_node(node, available.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (int(ipaddress.ip_address(node.address)), node.id))


def as_node(node: dict[str, Any], available: Mapping[str, float]) -> Node:
    """The node in an entry of `ray.nodes()`, with its resources that are not in use."""
    total = {key: node["Resources"].get(key, 0.0) for key in ("CPU", "GPU")}
    free = all(available.get(key, 0.0) >= amount for key, amount in total.items())
    return Node(node["NodeID"], node["NodeManagerAddress"], total["CPU"], int(total["GPU"]), free)
