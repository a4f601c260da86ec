"""Why a run failed: the one worker whose error came first, told apart from the errors that followed from it.

When a worker dies, the others fail a moment later because their peer is gone. Only the first is of use.
A worker that raises leaves its message in `errors/rank-N.txt` of the run's folder.
"""

from __future__ import annotations

import json
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from moesys.errors import MoesysError

LOST_PEER = re.compile(
    r"Connection (closed|reset) by|Connection refused|Broken pipe|Socket closed|recvValue failed"
    r"|sendBytes failed|ncclRemoteError|remote process exited|communicator (was|is) aborted"
    r"|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's TCPStore say when the worker at the other end is gone."""

PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code and, unless that is 0, what to tell the user."""

    exit_code: int
    message: str = ""


@dataclass(frozen=True)
class WorkerError:
    """What one worker left behind: its message and when it wrote it (ns since 1970)."""

    rank: int
    text: str
    time: int

    @property
    def is_consequence(self) -> bool:
        """Whether the error only says that another worker is gone."""
        return LOST_PEER.search(self.text) is not None


def error_file(run_dir: Path, rank: int) -> Path:
    """Where the worker of `rank` writes its error."""
    return run_dir / "errors" / f"rank-{rank}.txt"


def log_file(run_dir: Path, rank: int) -> Path:
    """Where the output of the worker of `rank` goes."""
    return run_dir / "logs" / f"rank-{rank}.log"


def record(run_dir: Path, rank: int, error: BaseException) -> str:
    """Write `error` to its rank's error file unless the worker did so itself; returns the file's text.

    A `MoesysError` is its message alone; anything else is a bug and keeps its traceback.
    """
    path = error_file(run_dir, rank)
    if not path.exists():
        known = isinstance(error, MoesysError)
        text = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return path.read_text().rstrip()


def exit_code_of(error: BaseException) -> int:
    """The exit code of a worker that ended with `error`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, MoesysError) else 1


def read_errors(run_dir: Path) -> list[WorkerError]:
    """The errors that workers of this run wrote, the earliest first."""
    errors = []
    for path in (run_dir / "errors").glob("rank-*.txt"):
        number = re.fullmatch(r"rank-(\d+)", path.stem)
        if number:
            text = path.read_text(errors="replace").rstrip()
            errors.append(WorkerError(int(number[1]), text, path.stat().st_mtime_ns))
    return sorted(errors, key=lambda error: error.time)


def first_cause(errors: list[WorkerError]) -> WorkerError | None:
    """Of errors sorted by time, the first that is not merely the loss of a peer; else the first."""
    causes = [error for error in errors if not error.is_consequence]
    return next(iter([*causes, *errors]), None)


def clear_traces(run_dir: Path) -> None:
    """Remove what an earlier attempt left and this one would mistake for its own: errors and rank map."""
    for path in [*(run_dir / "errors").glob("rank-*.txt"), run_dir / "ranks.json"]:
        path.unlink(missing_ok=True)


def read_ranks(run_dir: Path) -> dict[int, dict[str, object]]:
    """The rank-to-node map that the workers wrote, by rank; empty before they did.

    Accepts an object keyed by rank or a list in rank order; of each entry `host`, `node_ip`, `pid`,
    `local_rank` and `device` are in use.
    """
    try:
        ranks = json.loads((run_dir / "ranks.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    pairs = enumerate(ranks) if isinstance(ranks, list) else ranks.items()
    return {int(rank): entry for rank, entry in pairs}


def name(rank: int, run_dir: Path, pid: int | None = None, host: str | None = None) -> str:
    """ "rank 2 (pid 4711, node gpu-03)", as far as process and node are known."""
    entry = read_ranks(run_dir).get(rank, {})
    pid = entry.get("pid", pid)  # type: ignore[assignment]
    host = entry.get("host", host)  # type: ignore[assignment]
    known = [f"pid {pid}"] * (pid is not None) + [f"node {host}"] * (host is not None)
    return f"rank {rank} ({', '.join(known)})" if known else f"rank {rank}"


def log_tail(run_dir: Path, rank: int, lines: int = 10) -> str:
    """The last lines of a worker's log, indented, below a line that names the log; "" if there are none."""
    path = log_file(run_dir, rank)
    if not path.exists():
        return ""
    tail = path.read_text(errors="replace").rstrip().splitlines()[-lines:]
    return "\n".join([f"the last lines of {path}:", *(f"  {line}" for line in tail)]) if tail else ""
