"""Turns an exception of Ray Train into the one message that the user needs."""

from __future__ import annotations

import re
from pathlib import Path

from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from moesys.launchers.outcome import Outcome, first_cause, log_tail, name, outcome
from moesys.train.failure import Failure, FailureKind

NODE_LOST = re.compile(r"node (\S+ )?(has )?(died|failed|was terminated|is dead)", re.IGNORECASE)


def outcome_of(error: BaseException, run_dir: Path, where: str, timeout_s: float) -> Outcome:
    """The outcome of the run by the worker that failed first, without Ray's own tracebacks.

    `where` names the cluster; `timeout_s` is the time that workers had to start.
    """
    if isinstance(error, WorkerGroupError):
        return worker_outcome(error.worker_failures, run_dir)
    if isinstance(error, ControllerError):
        error = error.controller_failure
    if type(error).__name__ == "WorkerGroupStartupTimeoutError":
        waited = f"{timeout_s:.0f} s (launch.timeout_s)"
        return Outcome(1, f"{where} did not start all workers within {waited}: are its resources in use?")
    cause = error.cause if isinstance(error, RayTaskError) else error
    return Outcome(1, f"Ray failed: {type(cause).__name__}: {cause}")


def worker_outcome(failures: dict[int, Exception], run_dir: Path) -> Outcome:
    """The outcome of a run in which the workers of `failures` (by rank) failed.

    A worker's own exception arrives as `RuntimeError(text, failure as JSON)` (ray_worker.py); anything else
    means that its process is gone.
    """
    raised = {rank: Failure.parse(error.args[1]) for rank, error in failures.items() if is_own(error)}
    gone = [rank for rank in failures if rank not in raised]
    if gone:
        return Outcome(1, describe_death(gone[0], failures[gone[0]], run_dir), FailureKind.CRASH)
    cause = first_cause(raised.values())
    return outcome(cause, name(cause.rank, run_dir), run_dir)


def is_own(error: Exception) -> bool:
    """True if a worker's program raised `error` (ray_worker.py)."""
    return type(error) is RuntimeError and len(error.args) == 2


def describe_death(rank: int, error: Exception, run_dir: Path) -> str:
    """ "rank 2 (pid 4711, node 10.0.0.3) died: …" and the end of its log."""
    text = str(error)
    pid, host = re.search(r"pid=(\d+)", text), re.search(r"hostname='([^']+)'", text)
    who = name(rank, run_dir, int(pid[1]) if pid else None, host[1] if host else None)
    return f"{who} died: {reason(error)}\n{log_tail(run_dir, rank)}".rstrip()


def reason(error: Exception) -> str:
    """The reason that Ray gives for the death of a worker's process, in a sentence."""
    failure = getattr(error, "health_check_failure", error)
    text = str(failure)
    if isinstance(failure, OutOfMemoryError):
        return "Ray ended it because its node ran short of memory"
    if NODE_LOST.search(text):
        return "its node was lost"
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return "it no longer answers"
    return "its process was killed (SIGKILL, by someone or by the kernel for lack of memory) or crashed"
