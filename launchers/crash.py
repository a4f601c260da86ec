"""The cause of a worker's death that left no error: from exit code or signal, its log, and the kernel's counters."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

from moesys.launchers.outcome import log_tail, log_text
from moesys.launchers.processes import ExitStatus
from moesys.train.failure import BACKEND, Failure, FailureKind, kind_of_text

VMSTAT = Path("/proc/vmstat")

HINTS = {
    "SIGTERM": "by someone, or by a scheduler or service manager",
    "SIGHUP": "by someone, or by the end of a terminal",
    "SIGINT": "by someone",
    "SIGSEGV": "a fault in compiled code",
    "SIGFPE": "a fault in compiled code",
    "SIGILL": "a package was compiled for another processor",
    "SIGABRT": "compiled code gave up",
    "SIGUSR1": "schedulers announce the end of a job's time like this",
    "SIGUSR2": "schedulers announce the end of a job's time like this",
    "SIGXCPU": "the limit of CPU time, `ulimit -t`, is used up",
    "SIGXFSZ": "a file grew beyond the limit, `ulimit -f`",
}
"""The usual senders of a signal that ends a process."""

TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", re.MULTILINE)
TERMINATED = re.compile(r"terminate called after throwing an instance of .*\n\s*what\(\):\s*(.*)")
WATCHDOG = re.compile(r".*Watchdog caught collective operation timeout.*")
FATAL = re.compile(r"^Fatal Python error: (.*)", re.MULTILINE)


def failure(rank: int, ended: ExitStatus, run_dir: Path, killed_before: int | None) -> Failure:
    """The failure of a worker that ended without reporting one.

    `killed_before`: what `kills` returned when the run started.
    """
    last_line = last_words(log_text(run_dir, rank))
    aborted = ended.signal is signal.SIGABRT
    kind = FailureKind.EXIT if ended.signal is None or aborted else FailureKind.CRASH
    if aborted and last_line and BACKEND.search(last_line):
        kind_in_log = kind_of_text(last_line)
        kind = kind_in_log if kind_in_log in (FailureKind.LOST, FailureKind.TIMEOUT) else kind
    hint = reason(ended, killed_before)
    sentence = f"{ended}{f' ({hint})' if hint else ''}{f': {last_line}' if last_line else ''}"
    return Failure(rank, kind, sentence, log_tail(run_dir, rank), ended.code)


def reason(ended: ExitStatus, killed_before: int | None) -> str:
    """The sender of the signal, as far as it can be known; "" if there was none."""
    if ended.signal is signal.SIGKILL:
        return _killer(killed_before, kills())
    if ended.signal is signal.SIGBUS:
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
        return f"a file in use was cut short, or shared memory is full: {free:,} bytes are free in /dev/shm"
    return HINTS.get(ended.by or "", "")


def _killer(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "by someone, or by the kernel for lack of memory"
    if after > before:
        return "by the kernel, for lack of memory: see the memory estimate of --dry-run"
    return "by someone: the kernel counted no process killed for lack of memory"


def kills() -> int | None:
    """Processes that this machine's kernel has killed for lack of memory; None where it does not tell."""
    try:
        found = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def last_words(log: str) -> str | None:
    """The error that a log ends with: of Python, of C++, of NCCL's watchdog; None if there is none."""
    for pattern in (WATCHDOG, TERMINATED, TRACEBACK, FATAL):
        found = pattern.findall(log)
        if found:
            return str(found[-1]).strip()[:400]
    return None
