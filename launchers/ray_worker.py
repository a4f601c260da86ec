"""Runs inside a worker of Ray Train, and makes it look like a worker of the other launchers.

It has the same working folder, log file and error file. Nothing is reported through Ray Train, whose report is a
barrier over all workers.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypedDict

from moesys.config.schema import Config
from moesys.launchers.outcome import log_file
from moesys.train import heartbeat
from moesys.train.failure import Failure, FailureKind, error_file
from moesys.train.rank import header

HEAD_START_S = 2.0
"""Seconds for which the error of a lost peer is held back, so that Ray sees the peer's end first."""

Worker = Callable[[Config, Path], None]


class WorkerTask(TypedDict):
    """A worker's task: its configuration and run folder (absolute), the working folder of the launching process, and
    the function to call, as "module:function"."""

    config: Config
    run_dir: str
    cwd: str
    worker: str


def train_loop(task: WorkerTask) -> None:
    """Call the worker function; its error becomes a file and a `RuntimeError(text, failure as JSON)`.

    The error is plain, because Ray must be able to send it: an exception whose constructor takes more than a text
    cannot be unpickled.
    """
    rank, run_dir = int(os.environ["RANK"]), Path(task["run_dir"])
    if Path(task["cwd"]).is_dir():
        os.chdir(task["cwd"])
    if not run_dir.is_dir():
        rule = f"{run_dir} of the launching node is not on node {socket.gethostname()}"
        failure = Failure(
            rank, FailureKind.USER, f"{rule}\n    remedy: set output.runs to a folder that all nodes share"
        )
        raise RuntimeError(failure.text, failure.json)
    redirect_output(log_file(run_dir, rank))
    os.environ["MOESYS_NODE_IP"] = node_address()
    error_file(run_dir, rank).unlink(missing_ok=True)  # left by the attempt before a restart
    try:
        print(header(log_file(run_dir, rank)), flush=True)
        with heartbeat.Heartbeat(run_dir, rank, heartbeat.interval(task["config"].launch.timeout_s)):
            resolve(task["worker"])(task["config"], run_dir)
    except BaseException as error:
        failure = Failure.of(error, rank, run_dir)
        failure.write(run_dir)
        if failure.kind is FailureKind.LOST:
            time.sleep(HEAD_START_S)
        raise RuntimeError(failure.text, failure.json) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def node_address() -> str:
    """This node's address, as Ray knows it."""
    from ray.util import get_node_ip_address  # the driver must be able to report that Ray is missing

    return get_node_ip_address()


def resolve(path: str) -> Worker:
    """The function that "module:function" names."""
    module, _, function = path.partition(":")
    worker: Worker = getattr(import_module(module), function)
    return worker


def redirect_output(path: Path) -> None:
    """Append everything that this process prints, from C++ as well, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
