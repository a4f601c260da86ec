"""A rank's heartbeat: a small file, rewritten at intervals, that says where the rank is.

A thread writes the file, so it continues while the rank waits in a collective, and stops when the process is stopped or
its node is lost. Its bytes are replaced in place, which works on a full disk too.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

import moesys
from moesys.files import json_text

ROOT = os.path.dirname(moesys.__file__)

BYTES = 1024
"""Size of the file."""

WAITING = ("distributed_c10d.py", "_functional_collectives.py", "parallel/comm.py")
"""Ends of file names: a rank with its innermost call in such a file waits for others."""


def interval(timeout_s: float) -> float:
    """Seconds between two heartbeats, for ranks that wait `timeout_s` for each other."""
    return min(max(timeout_s / 20, 0.2), 15.0)


def heartbeat_file(run_dir: Path, rank: int) -> Path:
    """The file of the rank's heartbeat."""
    return run_dir / "beats" / f"rank-{rank}.json"


class Heartbeat:
    """While open, writes beats/rank-N.json every `interval` seconds."""

    def __init__(self, run_dir: Path, rank: int, interval: float = 1.0):
        self._path, self._rank, self.interval = heartbeat_file(run_dir, rank), rank, interval
        self._count, self._at, self._step, self._shown, self._ended = 0, "starting", 0, False, False
        self._main = threading.get_ident()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        global _heartbeat
        self._file = -1
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        _heartbeat = self
        self.write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _heartbeat
        _heartbeat = None
        self._end.set()
        self._thread.join()
        if self._file >= 0:
            if kind is None:
                self._ended = True
                self.write()  # the last one: this rank is done, and the launcher must not miss more
            os.close(self._file)  # after an error the last heartbeat still shows where this rank was

    def _run(self) -> None:
        while not self._end.wait(self.interval):
            self.write()

    def write(self) -> None:
        """Write a heartbeat now."""
        with self._lock, suppress(OSError):
            self._count += 1
            where, waits = _place(sys._current_frames().get(self._main))
            record = {
                "rank": self._rank, "count": self._count, "pid": os.getpid(), "host": socket.gethostname(),
                "node_ip": os.environ.get("MOESYS_NODE_IP", ""),
                "at": self._at, "shown": self._shown, "step": self._step, "where": where, "waits": waits,
                **({"ended": True} if self._ended else {}),
            }  # fmt: skip
            os.pwrite(self._file, json_text(record).encode()[: BYTES - 1].ljust(BYTES - 1) + b"\n", 0)


_heartbeat: Heartbeat | None = None


def set_interval(seconds: float) -> None:
    """Write a heartbeat every so many seconds from now on."""
    if _heartbeat is not None:
        _heartbeat.interval = seconds


def phase(what: str, shown: bool = False) -> None:
    """Note that this rank begins `what` ("loading data"); `shown`: the launcher shows it, if this is rank 0."""
    if _heartbeat is not None:
        _heartbeat._at, _heartbeat._shown = what, shown
        _heartbeat.write()


def step(number: int) -> None:
    """Note that this rank computes step `number`; the next heartbeat says so."""
    if _heartbeat is not None:
        _heartbeat._at, _heartbeat._step, _heartbeat._shown = "training", number, False


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """The place of a thread, "moesys/train/loop.py:58 in train_step", and True if it waits for other ranks."""
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None:
        return "", False
    waits = frame.f_code.co_filename.endswith(WAITING)
    while frame.f_back is not None and not frame.f_code.co_filename.startswith(ROOT):
        frame = frame.f_back
    file = os.path.relpath(frame.f_code.co_filename, os.path.dirname(ROOT))
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}", waits
