"""Measurements of training steps: they stay on the device until a record is due, and are then read all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesys.models.parts.moe import COUNTS, LOSSES
from moesys.parallel import comm
from moesys.train.engine import Engine, Update
from moesys.train.metric_table import LATER

MOST = 100
"""Steps, at most, that wait to be read: a run must not train for long without noticing that its steps are skipped."""


@dataclass(frozen=True)
class StepMeasurements:
    """A step's numbers on the host.

    Attributes:
        values: for its record: loss (mean of the global batch), mtp_loss_k for each depth k of multi-token prediction
            (mean over the tokens that it predicts), all_to_all_seconds (mean over ranks), and with MoE
            layers imbalance (largest expert's load / mean, mean over layers), rank_imbalance (the same of the ep
            ranks' loads), dropped (share of assignments), zero_share (assignments to zero-computation experts, where
            there are any), each of `LOSSES` that is on (unscaled, mean over layers and micro-batches).
        load: assignments per MoE layer and expert; None without such layers.
        norm: of the gradients, before clipping.
        skipped: True if nothing was updated.
        bad: the parameters of this rank whose gradients were not finite, if it was skipped.
    """

    step: int
    values: dict[str, Any]
    load: list[list[float]] | None
    norm: float
    skipped: bool
    bad: Callable[[], list[str]]


class _Waiting(NamedTuple):
    """A step that was not read yet. `own` [n] is to be summed over the world; `shared` [2] is the same on all ranks."""

    step: int
    own: Tensor
    shared: Tensor
    bad: Callable[[], list[str]]


class Backlog:
    """The steps of a run that the host has not read yet. One rank's part; `read` is collective over the world."""

    def __init__(self, engine: Engine):
        self.engine = engine
        moe = engine.config.model.moe
        self._layers = engine.config.model.moe_blocks
        self._shape = (len(self._layers), (moe.experts if moe else 0) + len(COUNTS) + len(LOSSES))
        self._waiting: list[_Waiting] = []

    @property
    def full(self) -> bool:
        """True if it must be read now, due or not: the same on all ranks."""
        return len(self._waiting) >= MOST

    def add(self, step: int, loss: Tensor, update: Update, all_to_all_seconds: float = 0.0) -> None:
        """Keep a step's measurements. Nothing is communicated, and the host waits for nothing.

        `loss` is a scalar.

        Losses of multi-token prediction are taken from the engine.

        loss: this rank's share, as `Engine.train` returns it. all_to_all_seconds: of this rank.
        """
        device = self.engine.mesh.device
        table = torch.zeros(self._shape, dtype=torch.float64, device=device)
        absent = torch.zeros((), dtype=torch.float64, device=device)
        for name, layer in self.engine.moe_layers().items():
            totals = layer.statistics.take()
            row = table[self._layers.index(int(name.split(".")[1]))]
            parts = [totals.get(key, absent) for key in (*COUNTS, *LOSSES)]
            row += torch.cat([torch.stack([p.double() for p in parts]), totals["load"].double()])
        # torch.tensor would copy from the host and wait for that.
        seconds = torch.full((), all_to_all_seconds, dtype=torch.float64, device=device)
        losses = torch.cat([loss.detach()[None].double(), self.engine.later_losses().double()])
        own = torch.cat([losses / self.engine.mesh.degrees.tp, seconds[None], table.flatten()])
        self._waiting.append(_Waiting(step, own, torch.stack([update.norm, update.skipped.double()]), update.bad))

    def read(self) -> list[StepMeasurements]:
        """Remove and return all waiting steps, in order. Collective: one all-reduce, and one wait of the host."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        total = comm.all_reduce(torch.stack([w.own for w in waiting]), tag=comm.STEP)
        rows = torch.cat([torch.stack([w.shared for w in waiting]), total], 1).cpu().numpy()
        return [self._measured(w, row) for w, row in zip(waiting, rows, strict=True)]

    def _measured(self, waiting: _Waiting, row: np.ndarray) -> StepMeasurements:
        model, length = self.engine.config.model, self.engine.config.train.seq_len
        norm, skipped, loss, *later, seconds = row[: 4 + model.predicted].tolist()
        values = {"loss": loss, "all_to_all_seconds": seconds / self.engine.mesh.degrees.world}
        values |= {f"{LATER}{k}": each * length / (length - k) for k, each in enumerate(later, 1)}
        load, moe = None, model.moe
        if moe is not None and self._layers:
            table = row[4 + model.predicted :].reshape(self._shape)
            load = table[:, len(COUNTS) + len(LOSSES) :].round(3).tolist()
            with np.errstate(all="ignore"):  # NaN in a skipped step is reported as NaN
                values |= _routing(table, moe, self.engine.mesh.degrees)
        return StepMeasurements(waiting.step, values, load, norm, bool(skipped), waiting.bad)


def _routing(table: np.ndarray, moe: Any, degrees: Any) -> dict[str, Any]:
    counted = dict(zip((*COUNTS, *LOSSES), table.T, strict=False))
    load = table[:, len(counted) :]
    per_rank = load.reshape(len(load), degrees.ep, -1).sum(-1)
    micro_batches = counted["calls"] / (degrees.cp * degrees.tp)
    values: dict[str, Any] = {
        "imbalance": _mean(load.max(1) / load.mean(1)),
        "rank_imbalance": _mean(per_rank.max(1) / per_rank.mean(1)),
        "dropped": float(counted["dropped"].sum() / load.sum()),
    }
    if moe.zero_computation:
        zero = counted["zero"].sum()
        values["zero_share"] = float(zero / (zero + load.sum()))
    for name, key in LOSSES.items():
        if (factor := getattr(moe, key)) and key not in moe.router.ignores:
            values[name] = _mean(counted[name] / micro_batches) / factor
    return values


def _mean(values: np.ndarray | Sequence[float]) -> float:
    return float(np.mean(values))
