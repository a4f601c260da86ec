"""Shows a run on TensorBoard: grouped curves, the configuration, and the load of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moesys.config.differences import saved_form
from moesys.config.schema import Config
from moesys.train.metric_table import LOAD, metric

SIDE = 8
"""Pixels of one expert in a picture of the load."""


class TensorBoardRun:
    """Writes event files into `folder`; those of steps after `resumed` are hidden."""

    def __init__(self, folder: Path, config: Config, resumed: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed + 1)
        if resumed == 0:
            self._writer.add_text("run/hyperparameters", _table(hyperparameters(config)), 0)
            self._writer.add_text("run/configuration", f"```yaml\n{yaml.safe_dump(saved_form(config))}```", 0)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars by their keys in metrics.jsonl."""
        for key, value in scalars.items():
            if tag := metric(key).tag:
                self._writer.add_scalar(tag, value, step)

    def write_load(self, step: int, load: Sequence[Sequence[float]]) -> None:
        """Every expert's load over its layer's mean: a picture [layers, experts] and a histogram.

        Black is no load, white twice the mean or more.
        """
        load_LE = np.asarray(load, dtype=np.float64)
        share_LE = load_LE / np.maximum(load_LE.mean(1, keepdims=True), 1e-12)
        picture = np.kron(np.clip(share_LE / 2, 0, 1), np.ones((SIDE, SIDE)))
        self._writer.add_image(LOAD.tag, picture[None], step)
        self._writer.add_histogram(f"{LOAD.tag}_over_mean", share_LE.flatten(), step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def hyperparameters(config: Config) -> dict[str, Any]:
    """The settings that distinguish runs."""
    m, t, o = config.model, config.train, config.train.optimizer
    found: dict[str, Any] = {
        "layers": m.layers,
        "hidden": m.hidden,
        "seed": config.seed,
        "sequence length": t.seq_len,
        "global batch": t.global_batch,
        "steps": t.steps,
        "learning rate": o.lr,
        "weight decay": o.weight_decay,
        "clip": o.clip,
        "schedule": t.schedule.kind,
        "precision": t.dtype,
        "engine": config.engine,
        "parallelism": ", ".join(f"{k} {v}" for k, v in layout(config).items()) or "none",
    }
    if m.moe is not None:
        found |= {"experts": m.moe.experts, "top k": m.moe.top_k, "gate": m.moe.gate.kind}
        found |= {"capacity factor": m.moe.capacity_factor, "balance loss": m.moe.balance_loss}
    return found


def layout(config: Config) -> dict[str, Any]:
    """The degrees of parallelism that are not 1."""
    p = config.parallel
    degrees = {axis: getattr(p, axis) for axis in ("dp_shard", "tp", "cp", "pp", "ep", "etp")}
    return {axis: degree for axis, degree in degrees.items() if degree != 1}


def _table(rows: Mapping[str, Any]) -> str:
    """Rows as Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
