"""Writes the metrics of steps: metrics.jsonl, load.jsonl, boards and Prometheus."""

from __future__ import annotations

from math import ceil, isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch.distributed as dist

from moesys.config.schema import Config
from moesys.files import json_objects, json_text, write_whole
from moesys.train.exporter import Exporter
from moesys.train.tensorboard_run import TensorBoardRun, layout
from moesys.train.wandb_run import WandbRun
from moesys.version import __version__

LOADS = 200
"""Records of every expert's load that a run keeps at most: thousands of experts at every step would be too many."""


class MetricsLog:
    """metrics.jsonl, load.jsonl (assignments per layer and expert), TensorBoard and Weights & Biases of a run.

    Only rank 0 writes.

    Records of steps after `resumed` (left by a run that ended after its last checkpoint) are removed, because they will
    be written again.
    """

    def __init__(self, config: Config, run_dir: Path, resumed: int):
        self.active = dist.get_rank() == 0
        if not self.active:
            return
        self._file, self._loads = (_continued(run_dir / f"{name}.jsonl", resumed) for name in ("metrics", "load"))
        self._every = max(1, ceil(config.train.steps / LOADS))
        self._layers = config.model.moe_blocks
        self._batch_tokens = config.train.global_batch * config.train.seq_len
        self._board = TensorBoardRun(run_dir / "tensorboard", config, resumed) if config.output.tensorboard else None
        port = config.measure.metrics_port
        self._exporter = (
            None if port is None else Exporter(config.name, port, config.measure.metrics_host, about(config))
        )
        self._wandb = WandbRun(config, run_dir) if config.output.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """Write one line; its numbers become scalars of the step `record["step"]`."""
        if not self.active:
            return
        self._file.write(json_text(record) + "\n")
        scalars = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        step = record["step"]
        if self._exporter is not None:  # NaN is a number to Prometheus
            done = {"step": step, "tokens": step * self._batch_tokens} if "loss" in record else {}
            self._exporter.set_metrics(scalars | done)
        finite = {k: v for k, v in scalars.items() if isfinite(v)}
        for board in (self._board, self._wandb):
            if board is not None:
                board.write(step, finite)

    def warn(self, step: int, text: str) -> None:
        """Write one line as a warning, which the live display shows."""
        self.write({"step": step, "warning": text})

    def write_load(self, step: int, load: list[list[float]] | None) -> None:
        """Write every expert's load and a picture of it at some steps; Prometheus gets it at every step."""
        if not self.active or load is None:
            return
        if self._exporter is not None:
            self._exporter.set_load(self._layers, load)
        if step % self._every == 0:
            self._loads.write(json_text({"step": step, "load": load}) + "\n")
            if self._board is not None:
                self._board.write_load(step, load)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        self._file.close()
        self._loads.close()
        if self._board is not None:
            self._board.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._wandb is not None:
            self._wandb.finish(failed=error is not None)


def about(config: Config) -> dict[str, str]:
    """Labels that describe a run."""
    degrees = " ".join(f"{axis}={degree}" for axis, degree in layout(config).items())
    return {"version": __version__, "engine": config.engine, "parallel": degrees}


def _continued(path: Path, last: int) -> TextIO:
    """A file of records to append to, without those of steps after `last`."""
    _truncate(path, last)
    return path.open("a", buffering=1)


def _truncate(path: Path, last: int) -> None:
    """Keep the records of steps up to `last`, without lines that are damaged or cut short."""
    if not path.exists():
        return
    steps = ((record, record.get("step")) for record in json_objects(path))
    kept = [record for record, step in steps if isinstance(step, int) and step <= last]
    write_whole(path, "".join(f"{json_text(record)}\n" for record in kept))
