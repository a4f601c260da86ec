"""Makes the folder of a run, and checks that everything in it can be written before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

from moesys.errors import FileError
from moesys.train import run_folder

LEAST = 2**20
"""Bytes that must be free: for the first records and logs."""


def make(run_dir: Path) -> None:
    """Make the folder of a run, unless it is there.

    Raises:
        FileError: it cannot be made or written to, its disk is full, or a name in it is of the wrong kind.
    """
    run_folder.check(run_dir)
    remedy = "\n    remedy: choose another output.runs or name"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        at = error.filename or run_dir
        raise FileError(f"{at}: {(error.strerror or str(error)).lower()}{remedy}") from None
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise FileError(f"{run_dir}: this user may not write there{remedy}")
    state = os.statvfs(run_dir)
    if state.f_blocks and (free := state.f_bavail * state.f_frsize) < LEAST:  # 0 blocks: unknown
        raise FileError(f"{run_dir}: the disk is full, {free:,} bytes are free{remedy}, or free some space")
