"""Detects collapsed routers: experts that get no tokens, and layers that send every token to the same expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesys.config.schema import Config

WINDOW = 50
"""Steps in a row for which a state must hold before it is reported, or all steps of a run that has fewer. Early in
training, experts of healthy routers are silent for twenty steps and come back."""

SILENT = 1000
"""An expert is dead when the mean expert has got this many assignments since it got its last one: its share is below a
thousandth of a balanced one's, which chance does not explain."""

NEAR = 0.95
"""A layer is collapsed when one expert gets at least this share of all its tokens. With k experts per token its
imbalance, largest / mean load, is then at least this share of the largest one possible, E / k. Where that is below 2,
as with k = 3 of 4, a much-liked expert is no fault."""


@dataclass(frozen=True)
class Fault:
    """A fault in the routing of one layer.

    Attributes:
        layer: "layers.3".
        kind: "dead", or "collapsed".
        experts: those without tokens, or those that nearly every token goes to.
        since: first step from which all of them are so.
    """

    layer: str
    kind: str
    experts: tuple[int, ...]
    since: int

    def __str__(self) -> str:
        count, shown = len(self.experts), ", ".join(map(str, self.experts[:8]))
        who = f"expert{'s' * (count > 1)} {shown}" + (f" and {count - 8} more" if count > 8 else "")
        if self.kind == "collapsed":
            each = "each get" if count > 1 else "gets"
            return f"{self.layer}: {who} {each} at least {NEAR:.0%} of all tokens since step {self.since}"
        return f"{self.layer}: no token for {who} since step {self.since}"

    def as_json(self) -> dict[str, Any]:
        """The fault as JSON."""
        return {"layer": self.layer, "kind": self.kind, "experts": list(self.experts), "since": self.since}


def sentence(faults: Sequence[Fault], most: int = 4) -> str:
    """Several faults in one line, at most so many in full."""
    more = len(faults) - most
    return "; ".join([*map(str, faults[:most]), *([f"and {more} more"] if more > 0 else [])])


class BalanceWatch:
    """Watches the load of every step, which all ranks have gathered for the metrics."""

    def __init__(self, config: Config):
        model, t = config.model, config.train
        moe = model.moe
        self.layers = [f"layers.{i}" for i in model.moe_blocks]
        self.active = bool(
            moe is not None
            and self.layers
            and not moe.router.even
            and moe.gate.force == "none"
            and moe.experts > moe.router.choices
        )
        if moe is None:
            return
        shape = (len(self.layers), moe.experts)
        self.steps, self.warmup, self.window = t.steps, t.schedule.warmup, min(WINDOW, t.steps)
        self.tokens, self.choices = t.global_batch * t.seq_len, moe.router.choices
        self.step = 0
        # First steps from which experts get nothing, or everything; the next step if they do not.
        self.silent_LE, self.full_LE = np.ones(shape, np.int64), np.ones(shape, np.int64)
        self.missed_LE = np.zeros(shape)
        self._reported: set[tuple[str, str, int]] = set()

    def take(self, step: int, load: Sequence[Sequence[float]] | None) -> list[Fault]:
        """Count a step's `load`, assignments per layer and expert; returns faults that are certain now and are new.

        Nothing is reported before the learning rate's warm-up ends, unless the run ends with it. `load` is None for a
        step without meaningful numbers.
        """
        if not self.active or load is None:
            return []
        self.step, load_LE = step, np.asarray(load)
        total_L1 = load_LE.sum(1, keepdims=True)
        self.silent_LE[load_LE > 0] = step + 1
        self.missed_LE = np.where(load_LE > 0, 0.0, self.missed_LE + total_L1 / load_LE.shape[1])
        # If some assignments are not counted, their sum suggests fewer tokens than there are.
        most_L1 = np.maximum(self.tokens, total_L1 / self.choices)
        self.full_LE[(load_LE < NEAR * most_L1) | (load_LE.shape[1] < 2 * self.choices)] = step + 1
        if step <= self.warmup and step < self.steps:
            return []
        fresh = [fault for fault in self.faults() if not self._known(fault)]
        self._reported |= {(fault.layer, fault.kind, expert) for fault in fresh for expert in fault.experts}
        return fresh

    def _known(self, fault: Fault) -> bool:
        return all((fault.layer, fault.kind, expert) in self._reported for expert in fault.experts)

    def faults(self) -> list[Fault]:
        """The present faults, layer by layer."""
        if not self.active:
            return []
        last = self.step - self.window + 1
        dead_LE = (self.silent_LE <= last) & (self.missed_LE >= SILENT)
        found = []
        for i, layer in enumerate(self.layers):
            of_layer = (("collapsed", self.full_LE[i] <= last, self.full_LE), ("dead", dead_LE[i], self.silent_LE))
            for kind, is_E, since_LE in of_layer:
                if is_E.any():
                    experts = np.flatnonzero(is_E)
                    found.append(Fault(layer, kind, tuple(experts.tolist()), int(since_LE[i, experts].max())))
        return found

    def counts(self) -> dict[str, int]:
        """Counts for metrics: dead experts of all layers, and collapsed layers; empty if the gate is not watched."""
        if not self.active:
            return {}
        faults = self.faults()
        dead = sum(len(fault.experts) for fault in faults if fault.kind == "dead")
        return {"dead_experts": dead, "collapsed_layers": sum(fault.kind == "collapsed" for fault in faults)}

    def as_json(self) -> dict[str, Any]:
        """The state for a checkpoint: layer, expert, first step (and missed load) of each silent or full expert."""
        if not self.active:
            return {}
        silent = np.argwhere(self.silent_LE <= self.step).tolist()
        full = np.argwhere(self.full_LE <= self.step).tolist()
        return {
            "silent": [[i, e, int(self.silent_LE[i, e]), float(self.missed_LE[i, e])] for i, e in silent],
            "full": [[i, e, int(self.full_LE[i, e])] for i, e in full],
        }

    def restore(self, step: int, kept: dict[str, Any]) -> None:
        """Continue from the state in the checkpoint of `step`; without one, as if no fault had begun before."""
        if not self.active:
            return
        self.step = step
        self.silent_LE.fill(step + 1)
        self.full_LE.fill(step + 1)
        self.missed_LE.fill(0.0)
        for i, e, since, missed in kept.get("silent", []):
            self.silent_LE[i, e], self.missed_LE[i, e] = since, missed
        for i, e, since in kept.get("full", []):
            self.full_LE[i, e] = since
