"""The folder of a run: checks that its names are free, and proposes its configuration. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesys.errors import FileError
from moesys.files import write_whole
from moesys.train.manifest import NAME, newest

FOLDERS = ("beats", "checkpoints", "errors", "export", "logs", "measure", "ray", "routing", "tensorboard", "wandb")
FILES = (
    "config.yaml", "job.sbatch", "launch.lock", "launches.jsonl", "load.jsonl", "metrics.jsonl", "ranks.json",
    "report.html", "summary.json", "wandb.json", "measure/steps.jsonl", "measure/summary.jsonl",
)  # fmt: skip
BEFORE = ".config.before.yaml"
"""The file with the run's previous configuration, while workers have not accepted the new one."""


def check(run_dir: Path) -> None:
    """Check that a run can make every file and folder that it writes.

    Raises:
        FileError: a file stands where a folder belongs, or a folder where a file does; names each.
    """
    wrong = []
    for folder in (*reversed(run_dir.parents), run_dir, *(run_dir / name for name in FOLDERS)):
        if os.path.lexists(folder) and not folder.is_dir():
            wrong.append(f"{folder} is a file, and a folder of this name is to be written")
    if not wrong:
        wrong = [
            f"{run_dir / name} is a folder, and a file of this name is to be written"
            for name in FILES
            if (run_dir / name).is_dir()
        ]
        checkpoints = run_dir / "checkpoints"
        if checkpoints.is_dir():
            odd = [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name) and not path.is_dir()]
            wrong += [f"{path} is a file, and a folder of this name is to be written" for path in sorted(odd)]
    if wrong:
        raise FileError("\n  ".join(wrong) + "\n    remedy: move it away, or choose another run: name=NAME")


@contextmanager
def proposed(run_dir: Path, text: str) -> Iterator[None]:
    """Write the run's new configuration. It stays if workers `accept` it; otherwise the previous one is restored."""
    path, before = run_dir / "config.yaml", run_dir / BEFORE
    kept = path.is_file() and newest(run_dir / "checkpoints") is not None
    if kept and not before.exists() and path.read_bytes() != text.encode():
        os.replace(path, before)
    write_whole(path, text)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):  # accepted, perhaps on another node, whose changes show here with delay
            os.replace(before, path)


def accept(run_dir: Path) -> None:
    """Keep the proposed configuration."""
    (run_dir / BEFORE).unlink(missing_ok=True)
