"""Worker processes of one machine: started together, ended together, none left behind.

Every worker leads its own process group, so that its children end with it, and dies with this process
(die_with_parent.py). An ended worker is not reaped before its group is gone: until then the kernel cannot give the
group's number to another process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moesys.train.failure import PIPE, Failure

DIE_WITH_PARENT = str(Path(__file__).with_name("die_with_parent.py"))


@dataclass(frozen=True)
class ExitStatus:
    """The end of a process: its exit code, or the signal that killed it."""

    code: int
    signal: signal.Signals | None = None

    @property
    def by(self) -> str | None:
        """The name of the signal that ended it, also where it caught the signal and exited with 128 + n."""
        if self.signal is not None:
            return self.signal.name
        known = {number.value for number in signal.Signals}
        return signal.Signals(self.code - 128).name if self.code - 128 in known else None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"was killed by {self.signal.name}"
        return f"exited with code {self.code}" + (f", as on {self.by}" if self.by else "")


class Processes:
    """The processes of all ranks; `command` is the same for each, `environments[rank]` is not.

    Must be started in the main thread: the kernel counts the end of the starting *thread* as the
    parent's death.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]], logs: Sequence[Path]):
        self._popen: list[subprocess.Popen[bytes]] = []
        self._pipes: list[int] = []
        self._reported: list[bytes] = []
        self._ended: dict[int, ExitStatus] = {}
        with_parent = [sys.executable, "-I", "-S", DIE_WITH_PARENT, str(os.getpid()), *command]
        try:
            for environment, log in zip(environments, logs, strict=True):
                process, pipe = spawn(with_parent, environment, log)
                self._popen.append(process)
                self._pipes.append(pipe)
                self._reported.append(b"")
        except BaseException:
            self.end(grace_s=0)
            raise

    @property
    def pids(self) -> list[int]:
        """Process numbers in rank order."""
        return [process.pid for process in self._popen]

    def ended(self) -> dict[int, ExitStatus]:
        """Rank → exit status of every process that has ended by now, in the order in which this was noticed."""
        for rank in range(len(self._popen)):
            if rank not in self._ended:
                self._note(rank, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return dict(self._ended)

    def failures(self) -> dict[int, Failure]:
        """Rank → the failure that its process has reported, see `moesys.train.failure`."""
        for rank, pipe in enumerate(self._pipes):
            with suppress(BlockingIOError):
                while part := os.read(pipe, 2**16):
                    self._reported[rank] += part
        return {rank: Failure.parse(line.decode()) for rank, line in enumerate(self._reported) if line.endswith(b"\n")}

    def end(self, grace_s: float = 5.0) -> None:
        """Send SIGTERM to all that still run, and SIGKILL to what is left of every group after `grace_s` seconds."""
        for rank in self._running():
            self._signal(rank, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank, process in enumerate(self._popen):
            if process.returncode is None:
                self._signal(rank, signal.SIGKILL)
                self._note(rank, os.WEXITED | os.WNOWAIT)
                process.wait()
        self.failures()
        while self._pipes:
            os.close(self._pipes.pop())

    def _running(self) -> list[int]:
        ended = self.ended()
        return [rank for rank in range(len(self._popen)) if rank not in ended]

    def _note(self, rank: int, options: int) -> None:
        state = os.waitid(os.P_PID, self._popen[rank].pid, options)
        if state is not None and rank not in self._ended:
            self._ended[rank] = from_status(state)

    def _signal(self, rank: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS refuses a group of zombies
            os.killpg(self._popen[rank].pid, number)


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start one process as leader of its own group, its output appended to `log`; returns it and its failure pipe."""
    log.parent.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    output: IO[bytes]
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env={**environment, PIPE: str(writing)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=(writing,),
            )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return process, reading


def from_status(state: os.waitid_result) -> ExitStatus:
    """The exit status in a result of `waitid`; its code is 128 + n for signal n, as in shells."""
    if state.si_code == os.CLD_EXITED:
        return ExitStatus(state.si_status)
    number = signal.Signals(state.si_status)
    return ExitStatus(128 + number, number)
