"""What gates are told before training begins, and what is written of what they decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moesys.data.corpus import Corpus
from moesys.moe.gates.hashed import HashGate
from moesys.moe.gates.replay import ReplayGate
from moesys.moe.record import RoutingRecorder
from moesys.train import routing_files
from moesys.train.engine import Engine

COUNTED, PIECES = 2**24, 64
"""Most tokens that frequencies are counted in, and from how many places of the training data they come."""


def prepare(engine: Engine, corpus: Corpus) -> None:
    """Tell balanced hash gates how often each id occurs, and replay gates what to replay.

    Raises:
        DataError: a recording is missing, or is not of this model.
    """
    layers, device = engine.moe_layers(), engine.mesh.device
    count_V = None
    for name, layer in layers.items():
        if isinstance(layer.gate, HashGate) and layer.gate.balanced:
            count_V = frequencies(corpus) if count_V is None else count_V
            layer.gate.fit(torch.from_numpy(count_V).to(device))
        if isinstance(layer.gate, ReplayGate):
            moe = engine.config.model.moe
            assert moe is not None and moe.gate.path is not None
            first, table = routing_files.read(Path(moe.gate.path), block(name))
            layer.gate.load(first, torch.from_numpy(table).to(device))


def frequencies(corpus: Corpus) -> np.ndarray:
    """How often each id occurs in the training data (in a part of it, where it is large): int64 [V]."""
    tokens = corpus.train
    pieces = [np.asarray(tokens[:])]
    if len(tokens) > COUNTED:
        size = COUNTED // PIECES
        pieces = [tokens[start : start + size] for start in (i * len(tokens) // PIECES for i in range(PIECES))]
    return np.sum([np.bincount(piece, minlength=corpus.vocab_size) for piece in pieces], axis=0)


def block(name: str) -> int:
    """The number of a layer's block: 3 of "layers.3.ffn"."""
    return int(name.split(".")[1])


class RoutingLog:
    """Writes the routing of a run's first `output.record_routing` steps: every rank its own tokens and layers.

    Files of steps after `resumed` are removed: those steps will be done again, perhaps by other ranks.
    """

    def __init__(self, engine: Engine, folder: Path, resumed: int):
        self.engine, self.folder = engine, folder
        self.steps = engine.config.output.record_routing
        self.recorder = RoutingRecorder(engine.moe_layers()) if self.steps > resumed else None
        if self.recorder is not None and engine.mesh.rank == 0:
            # No rank ends a step, and writes it, before this one begins it.
            routing_files.forget(folder, resumed)

    def write(self, step: int) -> None:
        """Write `step`, if it is among the first ones."""
        if self.recorder is None:
            return
        if step <= self.steps:
            moe = self.engine.config.model.moe
            assert moe is not None
            taken = self.recorder.take().items()
            layers = {block(name): (r.number_T.numpy(), r.expert_TK.numpy(), r.weight_TK.numpy()) for name, r in taken}
            routing_files.write(self.folder, step, self.engine.mesh.rank, layers, moe.experts)
        if step >= self.steps:
            self.recorder.close()
            self.recorder = None
