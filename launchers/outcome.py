"""The outcome of a run, and the cause of its failure: the worker that failed first.

When a worker dies, the others fail a moment later because their peer is gone. Only the first failure is of use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moesys.train.failure import Failure, FailureKind, error_file
from moesys.train.rank import MARK

TAIL_BYTES = 2**16
"""Size of the end of a log that is looked at."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run: its exit code and, unless that is 0, the message for the user and the kind of failure."""

    exit_code: int
    message: str = ""
    kind: FailureKind | None = None


def log_file(run_dir: Path, rank: int) -> Path:
    """The file with the output of the worker of `rank`."""
    return run_dir / "logs" / f"rank-{rank}.log"


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from, of at least one."""
    return min(failures, key=lambda failure: failure.order)


def outcome(failure: Failure, who: str, run_dir: Path) -> Outcome:
    """The end of a run that `failure` of the worker called `who` ended."""
    return Outcome(failure.exit_code, message(failure, who, run_dir), failure.kind)


def message(failure: Failure, who: str, run_dir: Path) -> str:
    """The text for the user: the cause in a sentence, and below it where to look for more."""
    if failure.kind in (FailureKind.CRASH, FailureKind.EXIT):
        return f"{who} {failure.text}"
    if failure.kind is FailureKind.USER:
        return f"{who} failed:\n{failure.sentence}"
    if failure.kind is FailureKind.BUG:
        return f"{who} failed: {failure.text}"
    path = error_file(run_dir, failure.rank)
    return f"{who} failed: {failure.sentence}" + (f"\n    traceback: {path}" if path.exists() else "")


def clear_traces(run_dir: Path) -> None:
    """Remove the errors, heartbeats and rank map of an earlier attempt, which this one would mistake for its own."""
    for path in [*(run_dir / "errors").glob("rank-*.txt"), run_dir / "ranks.json"]:
        path.unlink(missing_ok=True)
    shutil.rmtree(run_dir / "beats", ignore_errors=True)


def read_ranks(run_dir: Path) -> dict[int, dict[str, object]]:
    """The rank-to-node map that the workers wrote, by rank; empty before.

    Accepts an object keyed by rank or a list in rank order. Entries have `host`, `node_ip`, `pid`, `local_rank` and
    `device`.
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


def log_text(run_dir: Path, rank: int) -> str:
    """The end of what a worker printed in its last attempt; "" if there is no log."""
    path = log_file(run_dir, rank)
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    before, mark, after = text.rpartition(MARK)
    return after.partition("\n")[2] if mark else before + after


def log_tail(run_dir: Path, rank: int, lines: int = 10) -> str:
    """The last lines of a worker's log, indented, below a line that names the log; "" if there are none."""
    tail = log_text(run_dir, rank).rstrip().splitlines()[-lines:]
    return "\n".join([f"the last lines of {log_file(run_dir, rank)}:", *(f"  {line}" for line in tail)]) if tail else ""
