"""The trainer: steps, evaluation, resumption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import Config
from moesys.data.corpus import Corpus
from moesys.data.samples import Samples
from moesys.parallel import comm
from moesys.parallel.mesh import Ranks
from moesys.train import checkpoint, gates, optimizer
from moesys.train.engine import Engine, engine_of
from moesys.train.metrics import collect

IGNORED = -100
"""Label of a token that no loss counts."""


class Trainer:
    """An engine and its place in the data.

    Args:
        config: the run; `config.model.vocab_size` may be None, then the tokenizer decides.
        mesh: what the engine's `connect` gave.
        corpus: tokens for training and held-out tokens.
        dtype: type of the weights, default float32.
    """

    def __init__(self, config: Config, mesh: Ranks, corpus: Corpus, dtype: torch.dtype | None = None):
        self.config, self.mesh, self.corpus = config, mesh, corpus
        self.vocab_size = corpus.vocab_size
        self.engine: Engine = engine_of(config).build(config, mesh, corpus.vocab_size, dtype)
        gates.prepare(self.engine, corpus)
        self.samples = Samples(corpus.train, config.train.seq_len, config.seed)
        # A fixed shuffle, whatever the run's seed: evaluation spreads over the held-out documents.
        self.heldout = Samples(corpus.heldout, config.train.seq_len, seed=0)
        self.step, self.seen = 0, 0
        self.resumed: checkpoint.Loaded | None = None
        self.events: list[comm.Event] = []
        """The project's own collectives in the last step's passes through the model, on this rank."""
        self.load: list[list[float]] | None = None
        """Assignments of the last step, over all ranks, per MoE layer and expert."""
        self.before_update: Callable[[], None] | None = None
        """Called in every step when gradients are complete, before clipping."""

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over the next global batch: its metrics. Collective."""
        t = self.config.train
        begin = perf_counter()
        self.step += 1
        numbers = range(self.seen, self.seen + t.global_batch)
        self.seen += t.global_batch
        mine = self._mine(numbers)
        windows = torch.from_numpy(np.stack([self.samples[n] for n in mine]))
        with comm.record() as self.events:
            loss = self.engine.train(*self._split(windows), mine)
        if self.before_update is not None:
            self.before_update()
        rate = optimizer.learning_rate(t, self.step)
        norm = self.engine.update(rate)
        self._synchronise()
        travel = sum(e.exposed for e in self.events if e.level)
        values = collect(self.engine, loss, travel)
        self.load = values.pop("load", None)
        seconds = perf_counter() - begin
        return {
            "step": self.step,
            **{k: v for k, v in values.items() if k != "all_to_all_seconds"},
            "lr": rate,
            "grad_norm": norm,
            "all_to_all_share": values["all_to_all_seconds"] / seconds,
            "tokens_per_second": t.global_batch * t.seq_len / seconds,
            "step_seconds": seconds,
        }

    def evaluate(self) -> float:
        """Mean cross-entropy in nats per token of `eval_sequences` held-out sequences. Collective."""
        t = self.config.train
        count = self.heldout_windows()
        total, size = torch.zeros((), dtype=torch.float64, device=self.mesh.device), t.global_batch
        for start in range(0, count, size):
            numbers = self._mine(range(start, start + size))
            windows = torch.from_numpy(np.stack([self.heldout[min(n, count - 1)] for n in numbers]))
            tokens, labels = self._split(windows)
            labels[torch.tensor([n >= count for n in numbers], device=labels.device)] = IGNORED
            total += self.engine.evaluate(tokens, labels, numbers).double()
        for layer in self.engine.moe_layers().values():
            layer.statistics.take()
        dist.all_reduce(total)
        return total.item() * size / (self.mesh.degrees.tp * count)

    def heldout_windows(self) -> int:
        """Held-out sequences that `evaluate` uses."""
        return min(self.config.train.eval_sequences, len(self.heldout))

    def save(self, folder: Path, state: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint of this step under `folder`; arguments as of `checkpoint.save`. Collective."""
        return checkpoint.save(folder, self.engine, self.corpus, self.step, self.seen, state)

    def resume(self, folder: Path) -> Path | None:
        """Continue from the newest checkpoint under `folder`, if there is one. Collective.

        `self.resumed` has what it says: what has changed since, and what was kept with it.
        """
        path = checkpoint.newest(folder)
        if path is not None:
            self.resumed = checkpoint.load(path, self.engine, self.corpus)
            self.step, self.seen = self.resumed.step, self.resumed.samples
        return path

    def _mine(self, numbers: range) -> range:
        """This data rank's share of a global batch: consecutive micro-batches."""
        place, degrees = self.mesh.place, self.mesh.degrees
        rank = place["dp_replicate"] * degrees.dp_shard + place["dp_shard"]
        size = len(numbers) // degrees.dp
        return numbers[rank * size : (rank + 1) * size]

    def _split(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        windows = windows.to(self.mesh.device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _synchronise(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
