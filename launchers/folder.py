"""The folder of a run: whether all that belongs into it can be written, told before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

from moesys.errors import FileError

FOLDERS = ("logs", "errors", "beats", "checkpoints", "measure", "routing", "tensorboard", "ray")
FILES = ("launch.lock", "config.yaml", "ranks.json", "metrics.jsonl", "load.jsonl", "summary.json", "report.html")

LEAST = 2**20
"""Bytes that must be free: for the first records and logs."""


def make(run_dir: Path) -> None:
    """Make the folder of a run, unless it is there.

    Raises:
        FileError: it cannot be made or written to, its disk is full, or a name in it is of the wrong kind.
    """
    remedy = "\n    remedy: choose another output.runs or name"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        at = error.filename or run_dir
        raise FileError(f"{at}: {(error.strerror or str(error)).lower()}{remedy}") from None
    for name in FOLDERS:
        if (path := run_dir / name).exists() and not path.is_dir():
            raise FileError(f"{path} is a file, and a run needs a folder there\n    remedy: move it away")
    for name in FILES:
        if (run_dir / name).is_dir():
            raise FileError(f"{run_dir / name} is a folder, and a run needs a file there\n    remedy: move it away")
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise FileError(f"{run_dir}: this user may not write there{remedy}")
    state = os.statvfs(run_dir)
    if (free := state.f_bavail * state.f_frsize) < LEAST:
        raise FileError(f"{run_dir}: the disk is full, {free:,} bytes are free{remedy}, or free some space")
