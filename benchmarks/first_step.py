"""Seconds from a command to the first training step, by launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

from moesys import leftovers
from moesys.errors import MoesysError
from moesys.files import json_objects


def first_step(path: Path, overrides: list[str], launcher: str) -> float:
    """Seconds from the command to the first training step's record.

    Raises:
        MoesysError: the launch failed; with what it said.
    """
    with leftovers.temporary("bench") as folder:
        changes = [*overrides, "train.steps=1", "train.eval_sequences=1", "name=first", f"output.runs={folder}"]
        command = [sys.executable, "-m", "moesys.cli", "launch", str(path), "--launcher", launcher, *changes]
        begin = monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        metrics = folder / "first" / "metrics.jsonl"
        while process.poll() is None and not _has_step(metrics):
            sleep(0.02)
        seconds = monotonic() - begin
        _, errors = process.communicate()
        if process.returncode:
            raise MoesysError(f"{' '.join(command)} failed:\n{errors}")
        return seconds


def _has_step(metrics: Path) -> bool:
    return any("loss" in record for record in json_objects(metrics))
