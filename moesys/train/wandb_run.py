"""Logs a run to Weights & Biases; a resumed run keeps its id, a copied folder gets a new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from moesys.config.differences import saved_form
from moesys.config.schema import Config
from moesys.files import read_json, write_json
from moesys.train.metric_table import metric

FILE = "wandb.json"
"""The file in a run's folder with its id and the folder's path when it got that id."""

REMEDY = "remove it: what follows is logged as a run of its own"


class WandbRun:
    """Logs metrics by TensorBoard's tags."""

    def __init__(self, config: Config, run_dir: Path):
        import wandb

        self._run = wandb.init(
            project="moesys", name=config.name, id=identity(run_dir), resume="allow", config=saved_form(config)
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars by their keys in metrics.jsonl."""
        tags = {metric(key).tag: value for key, value in scalars.items()}
        self._run.log({tag: value for tag, value in tags.items() if tag}, step=step)

    def finish(self, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


def identity(run_dir: Path) -> str:
    """The id of the run in this folder, which keeps it; the copy of a folder that still exists gets another id.

    Raises:
        FileError: the file that keeps it is damaged.
    """
    path, here = run_dir / FILE, str(run_dir.resolve())
    kept: dict[str, Any] = read_json(path, REMEDY) if path.exists() else {}
    known, origin = kept.get("id"), kept.get("folder")
    copied = origin != here and isinstance(origin, str) and (Path(origin) / FILE).exists()
    if isinstance(known, str) and known and not copied:
        return known
    known = uuid4().hex[:16]
    write_json(path, {"id": known, "folder": here})
    return known
