"""The trainer: steps, evaluation, resumption."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from moesys.config.schema import Config
from moesys.data.corpus import Corpus
from moesys.data.samples import Samples
from moesys.errors import CheckpointError
from moesys.parallel import comm
from moesys.parallel.mesh import Ranks
from moesys.train import checkpoint, optimizer
from moesys.train.backlog import Backlog, StepMeasurements
from moesys.train.balance import BalanceWatch, Fault
from moesys.train.engine import Engine, engine_of, prepare_gates
from moesys.train.evaluation import OWN, Evaluation, share, split
from moesys.train.guard import Guard, Skip, demand_finite


class StepReport(NamedTuple):
    """A step that was read.

    Attributes:
        skip: if it updated nothing.
        faults: collapsed routers that it made certain.
    """

    measured: StepMeasurements
    skip: Skip | None
    faults: list[Fault]


class Trainer:
    """An engine and its place in the data.

    Args:
        config: the run; `config.model.vocab_size` may be None, then the tokenizer decides.
        mesh: as the engine's `connect` returned it.
        corpus: tokens for training and held-out tokens.
        dtype: type of the weights, default float32.
        draw: draw initial weights; without it, `resume` must find a checkpoint that has them.
    """

    def __init__(
        self, config: Config, mesh: Ranks, corpus: Corpus, dtype: torch.dtype | None = None, draw: bool = True
    ):
        self.config, self.mesh, self.corpus = config, mesh, corpus
        self._drawn = draw
        self.vocab_size = corpus.vocab_size
        self.engine: Engine = engine_of(config).build(config, mesh, corpus.vocab_size, dtype, draw)
        prepare_gates(self.engine, corpus)
        self.samples = Samples(corpus.train, config.train.seq_len, config.seed)
        self.evaluation = Evaluation(self.engine, corpus)
        self.step, self.seen = 0, 0
        self.resumed: checkpoint.ResumePoint | None = None
        self.guard, self.balance = Guard(config.train.skips), BalanceWatch(config)
        self.backlog = Backlog(self.engine)
        self.reports: list[StepReport] = []
        """The steps that the last call of `train_step` read, in their order."""
        self.events: list[comm.CollectiveRecord] = []
        """The recorded collectives of the last step's passes through the model, on this rank."""
        self.load: list[list[float]] | None = None
        """Assignments of the last step that was read, over all ranks: per MoE layer and expert."""
        self.seconds = 0.0
        """Seconds spent in `train_step` by the host's clock; the host waits for the device only to read."""
        self._read_at = 0.0
        self.before_update: Callable[[], None] | None = None
        """Called in every step when gradients are complete, before clipping."""

    def train_step(self, due: bool = True) -> dict[str, Any]:
        """One optimizer step over the next global batch: its metrics if they are `due`, else none. Collective.

        The host does not wait for metrics that are not due. It reads them with the next step that is due, or when the
        backlog is full. Times are then means over the steps since the last reading.

        A step with a loss or gradients that are not finite updates nothing and counts as a step: `guard` decides
        whether the run may go on.
        """
        begin = perf_counter()
        rate = optimizer.learning_rate(self.config.train, self.step + 1)
        self._step(rate, due)
        self.reports = self._read() if due or self.backlog.full else []
        self.seconds += perf_counter() - begin
        return self._record(rate, due) if self.reports else {}

    def _step(self, rate: float, due: bool) -> None:
        t = self.config.train
        self.step += 1
        numbers = range(self.seen, self.seen + t.global_batch)
        self.seen += t.global_batch
        mine = share(self.mesh, numbers)
        windows = torch.from_numpy(np.stack([self.samples[n] for n in mine]))
        self.events = []
        with ExitStack() as stack:
            if due:
                self.events = stack.enter_context(comm.record())
            loss = self.engine.train(*split(windows, self.mesh.device), mine)
        if self.before_update is not None:
            self.before_update()
        update = self.engine.update(rate)
        self.backlog.add(self.step, loss, update, self._travel() if due else 0.0)

    def _travel(self) -> float:
        """Seconds in which this rank waited for rows of experts in the last step."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return sum(e.exposed for e in self.events if e.level)

    def _read(self) -> list[StepReport]:
        """The steps since the last reading, with their skips and faults. Collective."""
        found = []
        for measured in self.backlog.read():
            skip = self.guard.take(measured, self.engine)
            faults = self.balance.take(measured.step, None if skip else measured.load)
            found.append(StepReport(measured, skip, faults))
            self.load = measured.load
        return found

    def _record(self, rate: float, due: bool) -> dict[str, Any]:
        """The record of the last step that was read; times are means over all steps that were read.

        Only steps that are `due` time their all-to-all: all_to_all_share is None for others.
        """
        t, last = self.config.train, self.reports[-1].measured
        seconds = (self.seconds - self._read_at) / len(self.reports)
        self._read_at = self.seconds
        values = dict(last.values)
        travel = values.pop("all_to_all_seconds")
        return {
            "step": last.step,
            **values,
            **self.balance.counts(),
            "lr": rate,
            "grad_norm": last.norm,
            "skipped": self.guard.total,
            "all_to_all_share": travel / seconds if due else None,
            "tokens_per_second": t.global_batch * t.seq_len / seconds,
            "step_seconds": seconds,
        }

    def evaluate(self) -> float:
        """Mean cross-entropy in nats per token of `eval_sequences` held-out sequences. Collective.

        `self.evaluation` has the texts of `train.eval`, too.
        """
        return self.evaluation.loss()

    @property
    def heldout(self) -> Samples:
        """The held-out sequences of the run's data."""
        return self.evaluation.samples[OWN]

    @property
    def heldout_bytes_per_token(self) -> float | None:
        """Bytes of text per token that `evaluate` predicts; None if the corpus does not know its text."""
        return self.evaluation.bytes_per_token()

    def heldout_windows(self) -> int:
        """Held-out sequences that `evaluate` uses."""
        return self.evaluation.windows()

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this step under `folder`. Collective.

        Raises:
            TrainingError: a tensor is not finite; nothing is written, and nothing removed.
        """
        self.reports += self._read()
        what, do = f"step {self.step}: no checkpoint is written", "go back to an older checkpoint"
        demand_finite(self.engine, what, f"{do} in {folder}, with a lower train.optimizer.lr")
        state = {"skips": self.guard.as_json(), "balance": self.balance.as_json()}
        return checkpoint.save(folder, self.engine, self.corpus, self.step, self.seen, state)

    def resume(self, folder: Path) -> Path | None:
        """Continue from the newest checkpoint under `folder`, if there is one. Collective.

        `self.resumed` has the changes since then, and the state that the checkpoint kept.

        Raises:
            TrainingError: something in it is not finite.
            CheckpointError: there is none, and no weights were drawn.
        """
        path = checkpoint.newest(folder)
        if path is None and not self._drawn:
            raise CheckpointError(f"{folder}: the checkpoint that was there a moment ago is gone")
        if path is not None:
            self.resumed = checkpoint.load(path, self.engine, self.corpus)
            self.backlog = Backlog(self.engine)
            self.step, self.seen = self.resumed.step, self.resumed.samples
            self.guard.restore(self.resumed.state.get("skips") or {})
            self.balance.restore(self.step, self.resumed.state.get("balance") or {})
            demand_finite(self.engine, str(path), "remove it, so that the run goes on from the one before")
        return path
