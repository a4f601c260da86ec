"""The failure of a worker: its kind, and its cause in one sentence.

The type of the error decides the kind, not a phrase in its text, unless PyTorch has no type for it. The failure reaches
the launcher through a pipe or Ray, because the disk may have failed. No torch is imported: launchers read failures too.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from moesys.errors import MoesysError
from moesys.files import json_text

PIPE = "MOESYS_FAILURE_PIPE"
"""The variable that names the open file descriptor that a failure is written to."""

LONGEST = 2**14
"""Characters of a traceback that are sent: a pipe takes 64 KiB before somebody reads."""


class FailureKind(StrEnum):
    """Kinds of failures."""

    USER = "user"
    """A `MoesysError`: its message is all there is to say."""
    DISK = "disk"
    """No space left on a disk."""
    FILE = "file"
    """A file that the system refuses to read or write."""
    MEMORY = "memory"
    """A process or device ran out of memory."""
    PORT = "port"
    """The port at which ranks meet is taken by another program."""
    BUG = "bug"
    """Any other error of Python; its traceback is part of the message."""
    CRASH = "crash"
    """The process was killed, or crashed outside of Python."""
    EXIT = "exit"
    """The process ended without an error."""
    TIMEOUT = "timeout"
    """Another rank did not come to a collective."""
    LOST = "lost"
    """The connection to another rank broke."""


FIRST = {FailureKind.CRASH: 0, FailureKind.EXIT: 2, FailureKind.TIMEOUT: 3, FailureKind.LOST: 4}
"""The order of kinds, 1 if absent. The lowest among a run's failures is the cause: a crash makes its peers fail."""

LOST_PEER = re.compile(
    r"Connection (closed|reset) by|Connection refused|Broken pipe|Socket closed|recvValue failed"
    r"|sendBytes failed|ncclRemoteError|remote process exited|communicator (was|is) aborted"
    r"|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
"""Words of gloo, NCCL and torch's TCPStore when the worker at the other end is gone."""

WAITED = re.compile(r"tim(ed|e) ?out|Watchdog caught collective operation", re.IGNORECASE)
"""Their words when the worker at the other end does not come."""

PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)

NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY")

NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")

BACKEND = re.compile(r"gloo|nccl|TCPStore|c10d|ProcessGroup", re.IGNORECASE)
"""In the text of a RuntimeError of torch.distributed: gloo's errors have no type of their own."""

REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EISDIR,
    errno.ENOTDIR, errno.ENAMETOOLONG, errno.EFBIG,
}  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """One worker's failure.

    `sentence` is the cause; `details` a traceback, or the end of a log; `at` when it failed (ns since 1970).
    """

    rank: int
    kind: FailureKind
    sentence: str
    details: str = ""
    exit_code: int = 1
    at: int = field(default_factory=time.time_ns)

    @classmethod
    def of(cls, error: BaseException, rank: int, run_dir: Path) -> Failure:
        """The failure of a worker that ended with `error`."""
        kind = kind_of(error)
        details = "" if kind is FailureKind.USER else "".join(traceback.format_exception(error)).rstrip()
        return cls(rank, kind, sentence(error, kind, run_dir), details[-LONGEST:], exit_code_of(error))

    @classmethod
    def parse(cls, text: str) -> Failure:
        """The failure in a line that `json` returned."""
        values = json.loads(text)
        return cls(**{**values, "kind": FailureKind(values["kind"])})

    @property
    def json(self) -> str:
        """One line that `parse` reads."""
        return json_text(asdict(self))

    @property
    def text(self) -> str:
        """Sentence and details."""
        return "\n".join(filter(None, (self.sentence, self.details)))

    @property
    def order(self) -> tuple[int, int]:
        """Sorts the cause before what follows from it."""
        return FIRST.get(self.kind, 1), self.at

    def write(self, run_dir: Path) -> None:
        """Write it to errors/rank-N.txt, if the disk allows."""
        with suppress(OSError):
            path = error_file(run_dir, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text + "\n", encoding="utf-8", errors="replace")

    def send(self) -> None:
        """Send it to the process that started this one, if that listens."""
        if descriptor := os.environ.get(PIPE):
            with suppress(OSError, ValueError):
                os.write(int(descriptor), f"{self.json}\n".encode())


def error_file(run_dir: Path, rank: int) -> Path:
    """The file in which the worker of `rank` writes its error."""
    return run_dir / "errors" / f"rank-{rank}.txt"


def exit_code_of(error: BaseException) -> int:
    """The exit code of a worker that ended with `error`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, MoesysError) else 1


def kind_of(error: BaseException) -> FailureKind:
    """The kind of `error`, by its type and the types of those that it came from."""
    if isinstance(error, MoesysError):
        return FailureKind.USER
    chain = list(_chain(error))
    numbers = {e.errno for e in chain if isinstance(e, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT} or any(NO_SPACE.search(str(e)) for e in chain):
        return FailureKind.DISK
    if any(_is(e, "OutOfMemoryError", "MemoryError") or NO_MEMORY.search(str(e)) for e in chain):
        return FailureKind.MEMORY
    if _is(error, "DistError") or (isinstance(error, RuntimeError) and BACKEND.search(str(error))):
        return kind_of_text(str(error), _is(error, "DistNetworkError"))
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
        return FailureKind.FILE
    return FailureKind.BUG


def kind_of_text(text: str, of_store: bool = False) -> FailureKind:
    """The kind of an error of torch.distributed; `of_store`: of the store, at which ranks meet."""
    if of_store and PORT_TAKEN.search(text):
        return FailureKind.PORT
    if LOST_PEER.search(text):
        return FailureKind.LOST
    return FailureKind.TIMEOUT if WAITED.search(text) else FailureKind.BUG


def _is(error: BaseException, *names: str) -> bool:
    """True if a class of `error` has one of these names: torch is not imported for its classes."""
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, its causes, and those of the ranks' errors in torch's CheckpointException."""
    found, waiting = set[int](), [error]
    while waiting:
        one = waiting.pop()
        if id(one) in found:
            continue
        found.add(id(one))
        yield one
        nested = getattr(one, "failures", None)
        inner = (
            [pair[0] for pair in nested.values()]
            if isinstance(nested, dict) and _is(one, "CheckpointException")
            else []
        )
        waiting += [e for e in (one.__cause__, one.__context__, *inner) if isinstance(e, BaseException)]


def sentence(error: BaseException, kind: FailureKind, run_dir: Path) -> str:
    """The cause of `error`, with its remedy if there is one."""
    said = first_line(error)
    if kind is FailureKind.USER:
        return str(error)
    if kind is FailureKind.DISK:
        return _disk(error, run_dir)
    if kind is FailureKind.FILE:
        assert isinstance(error, OSError)
        rule = (error.strerror or said).lower()
        return f"{error.filename}: {rule}\n    remedy: make it readable and writable for this user, then start again"
    if kind is FailureKind.MEMORY:
        remedy = "lower train.micro_batch or train.seq_len, set train.recompute, or use more ranks (see --dry-run)"
        return f"out of memory: {said}\n    remedy: {remedy}"
    if kind is FailureKind.PORT:
        return f"the port at which ranks meet is taken by another program: {said}"
    if kind is FailureKind.TIMEOUT:
        return f"waited for another rank in vain: {said}"
    if kind is FailureKind.LOST:
        return f"lost the connection to another rank: {said}"
    return said


def first_line(error: BaseException) -> str:
    """ "KeyError: 'x'"."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _disk(error: BaseException, run_dir: Path) -> str:
    named = [e.filename for e in _chain(error) if isinstance(e, OSError) and e.errno == errno.ENOSPC and e.filename]
    places = [Path(os.fsdecode(named[0])).parent] if named else [run_dir, Path(tempfile.gettempdir())]
    free = {place: _free(place) for place in places}
    place = min(free, key=lambda one: free[one])
    remedy = "free some space there, or set output.runs to a folder on another disk, then start again"
    return f"no space left on the disk of {place}: {free[place]:,} bytes are free\n    remedy: {remedy}"


def _free(place: Path) -> int:
    """Bytes that this user may still write on the disk of `place`, or of its nearest folder that exists."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
