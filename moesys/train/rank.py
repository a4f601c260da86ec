"""One worker process, from its first line of log to its exit code, whatever program it runs.

    RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 \\
        python -m moesys.train.rank moesys.train.worker runs/NAME

Slow imports, torch above all, happen inside, so that a failed import is reported like any other failure.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import os
import platform
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from moesys.errors import MoesysError
from moesys.train import heartbeat
from moesys.train.failure import Failure
from moesys.train.heartbeat import Heartbeat
from moesys.version import __version__

MARK = "=== attempt "
"""Begins the header line of an attempt in a log."""

LOG_ONLY = "=== "
"""Begins lines that are for the log alone: the launcher prints the same itself."""

COMMAND = "MOESYS_COMMAND"
"""The variable with the command that the user gave."""


def header(log: Path) -> str:
    """The header of a worker's output: attempt, time, process, versions and command.

    `log` holds the output of the attempts before this one.
    """
    before = 0
    with suppress(OSError), log.open("rb") as lines:
        before = sum(line.startswith(MARK.encode()) for line in lines)
    env, now = os.environ, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    process = f"rank {env.get('RANK', 0)} of {env.get('WORLD_SIZE', 1)}, host {socket.gethostname()}, pid {os.getpid()}"
    versions = f"moesys {__version__}, torch {_version('torch')}, Python {platform.python_version()}"
    return f"{MARK}{before + 1}, {now}: {process}, {versions}: {env.get(COMMAND) or shlex.join(sys.orig_argv)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def process(work: Callable[[], None], run_dir: Path) -> int:
    """Do `work`, a rank's part of the run in `run_dir`; returns 0, or reports its failure and returns the exit code."""
    rank = int(os.environ.get("RANK", 0))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        print(header(run_dir / "logs" / f"rank-{rank}.log"), flush=True)
        faulthandler.enable()
        with Heartbeat(run_dir, rank):
            work()
    except BaseException as error:
        failure = Failure.of(error, rank, run_dir)
        failure.send()
        failure.write(run_dir)
        with suppress(OSError):
            print(f"{LOG_ONLY}rank {rank} failed: {failure.sentence.splitlines()[0]}", file=sys.stderr, flush=True)
        return failure.exit_code or 1
    return 0


def main(words: Sequence[str]) -> int:
    """Call `run(config, run_dir)` of the module words[0], on the run in the folder words[1]."""
    program, run_dir = words[0], Path(words[1])

    def work() -> None:
        from moesys.config.load import load

        config = load(run_dir / "config.yaml").config
        heartbeat.set_interval(heartbeat.interval(config.launch.timeout_s))
        import_module(program).run(config, run_dir)

    return process(work, run_dir)


def leave(code: int) -> None:
    """End this process. After a failure it ends at once: process groups without peers may hang or abort at exit."""
    if code:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise MoesysError("usage: python -m moesys.train.rank MODULE RUN_DIR")
    leave(main(sys.argv[1:]))
