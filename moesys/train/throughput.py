"""Measures the throughput of a run over all its steps but the first."""

from __future__ import annotations

from typing import Any

from moesys.train.loop import Trainer


class Throughput:
    """Follows a trainer: `take` gets the result of each call of its `train_step`.

    The first step compiles and allocates: it does not count.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.first = trainer, trainer.step + 1
        self._begin = trainer.seconds
        self._exposed = self._timed = 0.0

    def take(self, record: dict[str, Any]) -> None:
        """Count a step, whose record may be empty."""
        if self.trainer.step == self.first:
            self._begin = self.trainer.seconds
        elif record and record["all_to_all_share"] is not None:
            self._timed += record["step_seconds"]
            self._exposed += record["all_to_all_share"] * record["step_seconds"]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second since the first step; None before the second step."""
        t, steps = self.trainer.config.train, self.trainer.step - self.first
        seconds = self.trainer.seconds - self._begin
        return t.global_batch * t.seq_len * steps / seconds if steps > 0 else None

    @property
    def all_to_all_share(self) -> float | None:
        """The share of exposed all-to-all in the time of steps that were read; None before the second step."""
        return self._exposed / self._timed if self._timed else None
