"""Losses of held-out texts: the share of the run's data, and the texts of `train.eval` by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import exp

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import Config
from moesys.data.corpus import Corpus, HeldOut
from moesys.data.samples import Samples
from moesys.measure.report.facts import bits_per_byte
from moesys.parallel.loss import IGNORED
from moesys.parallel.mesh import Ranks
from moesys.parallel.to_device import to_device
from moesys.train.engine import Engine

OWN = ""
"""The name of the run's own held-out text, a share of its data."""


@dataclass(frozen=True)
class TextLoss:
    """The loss of a text: nats per token over `sequences` of `seq_len` tokens.

    `bytes_per_token`: of the text that is predicted; None if it is not known.
    """

    loss: float
    sequences: int
    seq_len: int
    bytes_per_token: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large."""
        return exp(self.loss) if self.loss < 700 else float("inf")

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of text; None if that is not known."""
        return None if self.bytes_per_token is None else bits_per_byte(self.loss, self.bytes_per_token)


class Evaluation:
    """Held-out texts, and an engine that computes their losses.

    Args:
        engine: holds the weights.
        corpus: has the texts.
    """

    def __init__(self, engine: Engine, corpus: Corpus):
        self.engine, self.corpus = engine, corpus
        own = {OWN: HeldOut(corpus.heldout, corpus.tokenized)} if len(corpus.heldout) else {}
        self._texts = own | dict(corpus.more)
        # A fixed shuffle, whatever the run's seed: evaluation spreads over the held-out documents.
        length = self._config.train.seq_len
        self.samples = {name: Samples(text.tokens, length, seed=0) for name, text in self._texts.items()}
        self._bytes_per_token = cache(self._count_bytes)

    @property
    def _config(self) -> Config:
        return self.engine.config

    def text(self, name: str = OWN, every: bool = False) -> TextLoss:
        """The loss of a text and what belongs to it; `every`: of all its sequences. Collective over the world."""
        loss, count = self.loss(name, every), self.windows(name, every)
        return TextLoss(loss, count, self._config.train.seq_len, self._bytes_per_token(name, every))

    def loss(self, name: str = OWN, every: bool = False) -> float:
        """Mean cross-entropy in nats per token of a text's first sequences, or of `every` one. Collective.

        The last global batch is filled up with padding, which no loss counts and no expert computes.
        """
        samples, count, size = self.samples[name], self.windows(name, every), self._config.train.global_batch
        mesh = self.engine.mesh
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for start in range(0, count, size):
            numbers = share(mesh, range(start, start + size))
            windows = torch.from_numpy(np.stack([samples[min(n, count - 1)] for n in numbers]))
            tokens, labels = split(windows, mesh.device)
            labels[torch.tensor([n >= count for n in numbers], device=labels.device)] = IGNORED
            # Negative numbers mark padding for gates.
            total += self.engine.evaluate(tokens, labels, [n if n < count else -1 for n in numbers]).double()
        for layer in self.engine.moe_layers().values():
            layer.statistics.take()
        dist.all_reduce(total)
        return total.item() * size / (mesh.degrees.tp * count)

    def windows(self, name: str = OWN, every: bool = False) -> int:
        """Sequences of a text that are evaluated: `train.eval_sequences`, or `every` one."""
        there = len(self.samples[name])
        return there if every else min(self._config.train.eval_sequences, there)

    def bytes_per_token(self, name: str = OWN) -> float | None:
        """Bytes of text per token that `loss` predicts; None if the corpus does not know its text."""
        return self._bytes_per_token(name, False)

    def _count_bytes(self, name: str, every: bool) -> float | None:
        samples = self.samples[name]
        labels = (samples[number][1:] for number in range(self.windows(name, every)))
        return self.corpus.bytes_per_token(labels, self._texts[name].tokenized)

    def names(self) -> Iterator[str]:
        """All texts, the run's own first."""
        yield from self.samples


def share(mesh: Ranks, numbers: range) -> range:
    """A data rank's share of a global batch: consecutive micro-batches."""
    place, degrees = mesh.place, mesh.degrees
    rank = place["dp_replicate"] * degrees.dp_shard + place["dp_shard"]
    size = len(numbers) // degrees.dp
    return numbers[rank * size : (rank + 1) * size]


def split(windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, S] on `device`, of windows int64 [B, S + 1]."""
    windows = to_device(windows, device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
