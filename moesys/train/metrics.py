"""What a step measured, gathered from all ranks by one all-reduce, and where it is written."""

from __future__ import annotations

from math import ceil, isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

import moesys
from moesys.config.schema import Config
from moesys.files import json_objects, json_text, write_whole
from moesys.parallel import comm
from moesys.parallel.gates_check import IGNORES
from moesys.train.board import Board, layout
from moesys.train.engine import Engine
from moesys.train.exporter import Exporter
from moesys.train.wandb_run import WandbRun

LOSSES = {
    "balance": "balance_loss",
    "sequence_balance": "sequence_balance_loss",
    "global_balance": "global_balance_loss",
    "z": "z_loss",
    "importance": "importance_loss",
    "load_loss": "load_loss",
    "cmr": "cmr_coefficient",
}
"""The losses that layers report, and where model.moe has their coefficients."""

COUNTS = ("calls", "dropped", "zero")
"""What layers count beside losses and load: passes, and assignments dropped or to zero-computation experts."""


def collect(engine: Engine, loss: Tensor, all_to_all_seconds: float) -> dict[str, Any]:
    """Loss and routing of the step, over all ranks. Collective.

    Returns loss (mean of the global batch), all_to_all_seconds (mean over ranks), and with MoE layers:
    imbalance (largest expert's load / mean, mean over layers), rank_imbalance (the same of the ep
    ranks' loads), dropped (share of assignments), zero_share (assignments to zero-computation experts,
    where there are any), each of `LOSSES` that is on (unscaled, mean over layers and micro-batches), and
    load: assignments per MoE layer and expert, lists of numbers.
    """
    config, degrees, device = engine.config, engine.mesh.degrees, engine.mesh.device
    moe = config.model.moe
    layers = [i for i in range(config.model.layers) if config.model.is_moe(i)]
    width = (moe.experts if moe else 0) + len(COUNTS) + len(LOSSES)
    table = torch.zeros(len(layers), width, dtype=torch.float64, device=device)
    absent = torch.zeros((), dtype=torch.float64, device=device)
    for name, layer in engine.moe_layers().items():
        totals = layer.statistics.take()
        row = table[layers.index(int(name.split(".")[1]))]
        parts = [totals.get(key, absent) for key in (*COUNTS, *LOSSES)]
        row += torch.cat([torch.stack([p.double() for p in parts]), totals["load"].double()])
    head = torch.tensor([0.0, all_to_all_seconds], dtype=torch.float64, device=device)
    head[0] = loss.double() / degrees.tp
    packed = comm.total(torch.cat([head, table.flatten()]), way=comm.STEP)
    values = {"loss": packed[0].item(), "all_to_all_seconds": packed[1].item() / degrees.world}
    if moe is not None and layers:
        values |= _routing(packed[2:].view_as(table), moe, degrees)
    return values


def _routing(table: Tensor, moe, degrees) -> dict[str, Any]:
    counted = dict(zip((*COUNTS, *LOSSES), table.T, strict=False))
    load = table[:, len(counted) :]
    per_rank = load.view(len(load), degrees.ep, -1).sum(-1)
    micro_batches = counted["calls"] / (degrees.cp * degrees.tp)
    values: dict[str, Any] = {
        "load": load.round(decimals=3).tolist(),
        "imbalance": (load.amax(1) / load.mean(1)).mean().item(),
        "rank_imbalance": (per_rank.amax(1) / per_rank.mean(1)).mean().item(),
        "dropped": (counted["dropped"].sum() / load.sum()).item(),
    }
    if moe.zero_computation:
        zero = counted["zero"].sum()
        values["zero_share"] = (zero / (zero + load.sum())).item()
    for name, key in LOSSES.items():
        if (factor := getattr(moe, key)) and key not in IGNORES[moe.gate.kind]:
            values[name] = (counted[name] / micro_batches).mean().item() / factor
    return values


LOADS = 200
"""Most records of every expert's load that a run keeps: thousands of experts at every step would be too many."""


class MetricsLog:
    """metrics.jsonl, load.jsonl (assignments per layer and expert), TensorBoard and Weights & Biases of a run.

    Does nothing except on rank 0.

    Records of steps after `resumed` (left by a run that ended after its last checkpoint) are removed:
    they will be written again.
    """

    def __init__(self, config: Config, run_dir: Path, resumed: int):
        self.active = dist.get_rank() == 0
        if not self.active:
            return
        self._file, self._loads = (_continued(run_dir / f"{name}.jsonl", resumed) for name in ("metrics", "load"))
        self._every = max(1, ceil(config.train.steps / LOADS))
        self._layers = [i for i in range(config.model.layers) if config.model.is_moe(i)]
        self._batch_tokens = config.train.global_batch * config.train.seq_len
        self._board = Board(run_dir / "tensorboard", config, resumed) if config.output.tensorboard else None
        port = config.measure.metrics_port
        self._exporter = (
            None if port is None else Exporter(config.name, port, config.measure.metrics_host, about(config))
        )
        self._wandb = WandbRun(config, run_dir) if config.output.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """One line; numbers among its values become scalars of the step `record["step"]`."""
        if not self.active:
            return
        self._file.write(json_text(record) + "\n")
        scalars = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        step = record["step"]
        if self._exporter is not None:  # NaN is a number to Prometheus
            done = {"step": step, "tokens": step * self._batch_tokens} if "loss" in record else {}
            self._exporter.tell(scalars | done)
        finite = {k: v for k, v in scalars.items() if isfinite(v)}
        for board in (self._board, self._wandb):
            if board is not None:
                board.write(step, finite)

    def warn(self, step: int, text: str) -> None:
        """One line that a user should see; the live display shows it."""
        self.write({"step": step, "warning": text})

    def write_load(self, step: int, load: list[list[float]] | None) -> None:
        """One line with every expert's load, and a picture, of every so many steps only; Prometheus is told always."""
        if not self.active or load is None:
            return
        if self._exporter is not None:
            self._exporter.tell_load(self._layers, load)
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
    """Facts of a run, for labels."""
    degrees = " ".join(f"{axis}={degree}" for axis, degree in layout(config).items())
    return {"version": moesys.__version__, "engine": config.engine, "parallel": degrees}


def _continued(path: Path, last: int) -> TextIO:
    """A file of records to append to, without those of steps after `last`."""
    _truncate(path, last)
    return path.open("a", buffering=1)


def _truncate(path: Path, last: int) -> None:
    """Keep the records of steps up to `last`; lines that are damaged or cut short are no records."""
    if not path.exists():
        return
    steps = ((record, record.get("step")) for record in json_objects(path))
    kept = [record for record, step in steps if isinstance(step, int) and step <= last]
    write_whole(path, "".join(f"{json_text(record)}\n" for record in kept))
