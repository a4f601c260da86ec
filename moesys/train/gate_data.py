"""Prepares gates before training begins: frequencies of ids for hash gates, recordings for replay gates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moesys.data.corpus import Corpus
from moesys.moe.gates.hashed import HashGate
from moesys.moe.gates.replay import ReplayGate
from moesys.train import routing_files
from moesys.train.engine import Engine
from moesys.train.routing_files import block

COUNTED, PIECES = 2**24, 64
"""Most tokens that frequencies are counted in, and from how many places of the training data they come."""


def prepare(engine: Engine, corpus: Corpus) -> None:
    """Give balanced hash gates the frequencies of ids, and replay gates their recording.

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
    """Occurrences of each id in the training data, or in a part of large data: int64 [V]."""
    tokens = corpus.train
    pieces = [np.asarray(tokens[:])]
    if len(tokens) > COUNTED:
        size = COUNTED // PIECES
        pieces = [tokens[start : start + size] for start in (i * len(tokens) // PIECES for i in range(PIECES))]
    return np.sum([np.bincount(piece, minlength=corpus.vocab_size) for piece in pieces], axis=0)
