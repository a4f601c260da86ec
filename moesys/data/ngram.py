"""Unigram and bigram models: the baselines that a language model must beat.

With N training tokens, c(w) the count of w, V the vocabulary, c(h w) the count of the pair, c(h) of pairs
that begin with h and T(h) of different tokens after h:

- unigram, add-one smoothed: `p(w) = (c(w) + 1) / (N + V)`
- bigram, Witten-Bell interpolated (Witten & Bell 1991; Chen & Goodman 1999):
  `p(w | h) = (c(h w) + T(h) · p(w)) / (c(h) + T(h))`, and `p(w)` after an h never seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesys.data.tokens import Tokens

BLOCK = 1 << 22
"""Tokens counted at once."""
FIT = 1 << 27
"""Training tokens that the models are fitted on at most: evenly spaced blocks of a larger corpus."""


def cross_entropies(train: Tokens, windows: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Cross-entropy of the unigram and of the bigram model, in nats per predicted token.

    Args:
        train: [T], the tokens to fit on.
        windows: integers [N, seq_len + 1]; every token but the first of a window is predicted, by the
            bigram model from the true token before it.
        vocab_size: ids are below it.
    """
    before, after = windows[:, :-1].ravel().astype(np.int64), windows[:, 1:].ravel().astype(np.int64)
    counts, (codes, pairs) = _count(train, vocab_size)
    unigram = (counts[after] + 1) / (counts.sum() + vocab_size)
    histories = codes // vocab_size
    followers = np.bincount(histories, minlength=vocab_size)[before]
    seen = np.bincount(histories, weights=pairs, minlength=vocab_size)[before]
    asked = before * vocab_size + after
    where = np.minimum(np.searchsorted(codes, asked), max(0, len(codes) - 1))
    together = np.where(codes[where] == asked, pairs[where], 0) if len(codes) else np.zeros(len(asked))
    bigram = np.where(seen > 0, (together + followers * unigram) / np.maximum(seen + followers, 1), unigram)
    return float(-np.log(unigram).mean()), float(-np.log(bigram).mean())


def _count(train: Tokens, vocab_size: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Counts of tokens [V], and of pairs: sorted codes `h · V + w` with their counts."""
    counts = np.zeros(vocab_size, np.int64)
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens, is_last in _blocks(train):
        counts += np.bincount(tokens if is_last else tokens[:-1], minlength=vocab_size)
        runs.append(_tally(tokens[:-1] * vocab_size + tokens[1:], vocab_size))
        # As in merge sort, only runs of like size are merged: every pair is moved log(runs) times.
        while len(runs) > 1 and 2 * len(runs[-1][0]) >= len(runs[-2][0]):
            runs.append(_merge(runs.pop(), runs.pop()))
    while len(runs) > 1:
        runs.append(_merge(runs.pop(), runs.pop()))
    return counts, runs[0]


def _blocks(train: Tokens) -> Iterator[tuple[np.ndarray, bool]]:
    """int64 blocks, each with the first token of the next, and True for the last one."""
    count = max(1, -(-(len(train) - 1) // BLOCK))
    chosen = range(count) if count * BLOCK <= FIT else np.linspace(0, count - 1, FIT // BLOCK, dtype=np.int64)
    for number in chosen:
        begin = int(number) * BLOCK
        yield np.asarray(train[begin : begin + BLOCK + 1], np.int64), begin + BLOCK + 1 >= len(train)


def _tally(codes: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted different codes and their counts; by a table where one is small, else by sorting."""
    if vocab_size**2 > BLOCK:
        return np.unique(codes, return_counts=True)
    table = np.bincount(codes)
    present = np.flatnonzero(table)
    return present, table[present]


def _merge(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    codes = np.concatenate([a[0], b[0]])
    order = np.argsort(codes, kind="stable")  # linear: it finds the two sorted runs
    codes, counts = codes[order], np.concatenate([a[1], b[1]])[order]
    begins = np.flatnonzero(np.diff(codes, prepend=-1))
    return codes[begins], np.add.reduceat(counts, begins) if len(begins) else counts
