"""What gates are told before training begins."""

from __future__ import annotations

import numpy as np
import torch

from moesys.data.corpus import Corpus
from moesys.moe.gates.hashed import HashGate
from moesys.parallel.compose import Composed

COUNTED, PIECES = 2**24, 64
"""Most tokens that frequencies are counted in, and from how many places of the training data they come."""


def prepare(model: Composed, corpus: Corpus) -> None:
    """Tell balanced hash gates how often each id occurs."""
    hashed = [layer.gate for layer in model.moe_layers().values() if isinstance(layer.gate, HashGate)]
    if any(gate.balanced for gate in hashed):
        count_V = torch.from_numpy(frequencies(corpus)).to(model.mesh.device)
        for gate in hashed:
            gate.fit(count_V)


def frequencies(corpus: Corpus) -> np.ndarray:
    """How often each id occurs in the training data (in a part of it, where it is large): int64 [V]."""
    tokens = corpus.train
    size = min(len(tokens), COUNTED) // PIECES
    starts = [i * len(tokens) // PIECES for i in range(PIECES)]
    pieces = (tokens[start : start + size] for start in starts) if len(tokens) > COUNTED else [tokens[:]]
    total = np.zeros(corpus.vocab_size, dtype=np.int64)
    for piece in pieces:
        total += np.bincount(np.asarray(piece), minlength=corpus.vocab_size)
    return total
