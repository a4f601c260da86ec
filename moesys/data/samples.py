"""Sequences in the order of training.

The seed and the global number alone decide a sample: neither the layout of ranks, nor the batch size, nor a resumption
matters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesys.data.tokens import Tokens

ROUNDS = 8
"""Rounds of the Feistel network."""
MASK = (1 << 64) - 1


class Samples:
    """Windows of `seq_len + 1` tokens, neighbours sharing the one token that is label only.

    Sample n is window p(n mod W) of epoch n // W, where W is the number of windows and p a permutation
    made from (seed, epoch). Tokens after the last whole window are not used.

    Args:
        tokens: [T].
        seq_len: tokens that the model sees of a sample.
        seed: of the permutations; None: the windows as they lie.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int | None = None):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._windows = (len(tokens) - 1) // seq_len
        if self._windows < 1:
            raise ValueError(f"{len(tokens)} tokens hold no window of {seq_len + 1}")

    def __len__(self) -> int:
        """Windows per epoch."""
        return self._windows

    def __getitem__(self, number: int) -> np.ndarray:
        """Sample `number` of the run, from 0 and without end: int64 [seq_len + 1]."""
        if number < 0:
            raise IndexError(f"sample {number}")
        epoch, place = divmod(number, self._windows)
        window = place if self.seed is None else permuted(place, self._windows, self.seed, epoch)
        begin = window * self.seq_len
        return np.array(self.tokens[begin : begin + self.seq_len + 1], np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        """One epoch."""
        return (self[number] for number in range(self._windows))

    def batch(self, step: int, global_batch: int) -> range:
        """Sample numbers of a step, counted from 1 as in the metrics, of constant batch size."""
        return range((step - 1) * global_batch, step * global_batch)


def permuted(place: int, size: int, seed: int, epoch: int) -> int:
    """The image of `place` under a pseudo-random permutation of 0 … size - 1, made from (seed, epoch).

    A balanced Feistel network permutes the next power of four; its cycle is followed until the number is below `size`
    (Black & Rogaway 2002). So any sample takes constant time and memory, and, unlike numpy's generators, it is the same
    in every version.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    start = _mix(_mix(_mix(seed & MASK) + (seed >> 64)) + epoch)
    while True:
        left, right = place >> half, place & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mix(start + ((turn + 1) << 40) + right) & low)
        place = left << half | right
        if place < size:
            return place


def _mix(z: int) -> int:
    """SplitMix64 (Steele et al. 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
