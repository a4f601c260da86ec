"""`output.export`: a run's checkpoints as released models' folders, each complete or absent, beside training.

Rank 0 starts a process for each: training does not wait, and the memory is not the trainer's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from moesys.config.schema import Config
from moesys.errors import CheckpointError
from moesys.train.manifest import complete

FOLDER = "export"


class RunExports:
    """The exports of a run, on its rank 0; on others it does nothing.

    Args:
        active: this process is rank 0.
    """

    def __init__(self, config: Config, run_dir: Path, active: bool):
        self.config, self.folder = config, run_dir / FOLDER
        self.checkpoints = run_dir / "checkpoints"
        self._active = active and config.output.export == "hf"
        self._process: subprocess.Popen[str] | None = None
        self._to: Path | None = None

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint was written that is not the last one: start to export it, if every one is to be."""
        if self._active and self.config.output.export_checkpoints:
            self._start(checkpoint)

    def before_saving(self) -> None:
        """Wait for the export before, whose checkpoint may be removed when the next one is written."""
        self._wait()

    def finish(self, checkpoint: Path) -> Path | None:
        """Export the last checkpoint; returns its folder, or None if none is wanted.

        Raises:
            CheckpointError: it failed; the run and its checkpoint are complete.
        """
        if not self._active:
            return None
        self._start(checkpoint)
        self._wait()
        return self.folder / checkpoint.name

    def _start(self, checkpoint: Path) -> None:
        self._wait()
        self._to = self.folder / checkpoint.name
        if self._to.exists():
            return
        command = [sys.executable, "-m", "moesys", "export", str(checkpoint), "--to", str(self._to)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def _wait(self) -> None:
        if self._process is None:
            return
        _, said = self._process.communicate()
        code, self._process = self._process.returncode, None
        if code:
            lines = said.strip().splitlines() or [f"exit code {code}"]
            rule = f"{self._to} was not exported; the checkpoint is complete: " + "\n".join(lines)
            raise CheckpointError(rule)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove exports of checkpoints that are gone, save the one that was just written."""
        kept = {path.name for path in complete(self.checkpoints)} | {self._to.name if self._to else ""}
        for path in self.folder.glob("step-*"):
            if path.name not in kept:
                shutil.rmtree(path)
