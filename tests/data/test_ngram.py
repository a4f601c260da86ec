from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import calls

from moesys.data import ngram
from moesys.data.ngram import cross_entropies


def slow(train, windows, vocab_size):
    """The formulas of the module, one token at a time."""
    counts, pairs, begins, followers = Counter(train), Counter(), Counter(), defaultdict(set)
    for h, w in pairwise(train):
        pairs[h, w] += 1
        begins[h] += 1
        followers[h].add(w)

    def unigram(w):
        return (counts[w] + 1) / (len(train) + vocab_size)

    def bigram(h, w):
        if not begins[h]:
            return unigram(w)
        kinds = len(followers[h])
        return (pairs[h, w] + kinds * unigram(w)) / (begins[h] + kinds)

    asked = [(h, w) for window in windows for h, w in pairwise(window)]
    return (
        -sum(log(unigram(w)) for _, w in asked) / len(asked),
        -sum(log(bigram(h, w)) for h, w in asked) / len(asked),
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_both_equal_their_formulas(data):
    vocab_size = data.draw(st.sampled_from([2, 5, 30, 3000, 200_000]))
    token = st.integers(0, vocab_size - 1) | st.integers(0, min(4, vocab_size - 1))
    train = data.draw(st.lists(token, min_size=2, max_size=200))
    windows = data.draw(st.lists(st.lists(token, min_size=6, max_size=6), min_size=1, max_size=5))
    found = cross_entropies(np.array(train, np.uint32), np.array(windows), vocab_size)
    assert found == pytest.approx(slow(train, windows, vocab_size), rel=1e-12)


@pytest.mark.parametrize("vocab_size", [200, 200_000])
@pytest.mark.parametrize("length", [10_000, 10_001, 10_080])
def test_counting_in_blocks_changes_nothing(monkeypatch, vocab_size, length):
    random = np.random.default_rng(0)
    train = (random.zipf(1.3, length) % 200).astype(np.uint16)
    windows = train[:1200].reshape(30, 40).astype(np.int64)
    expected = slow(train.tolist(), windows.tolist(), vocab_size)
    monkeypatch.setattr(ngram, "BLOCK", 96)
    assert cross_entropies(train, windows, vocab_size) == pytest.approx(expected, rel=1e-12)


def test_a_corpus_too_large_to_count_is_sampled_evenly(monkeypatch):
    random = np.random.default_rng(0)
    train = (random.zipf(1.3, 400_000) % 50).astype(np.uint16)
    windows = train[-40_000:].reshape(100, 400)
    whole = cross_entropies(train, windows, 50)
    monkeypatch.setattr(ngram, "BLOCK", 1000)
    monkeypatch.setattr(ngram, "FIT", 40_000)
    sampled = cross_entropies(train, windows, 50)
    assert sampled == pytest.approx(whole, rel=0.01)
    assert sampled != whole


def test_probabilities_sum_to_one():
    """Over the next token, for histories seen and not: exp(-cross-entropy) of single predictions."""
    train = np.array([0, 1, 0, 2, 0, 1, 3])
    for history in range(5):
        each = [cross_entropies(train, np.array([[history, w]]), 5) for w in range(5)]
        assert sum(np.exp(-unigram) for unigram, _ in each) == pytest.approx(1)
        assert sum(np.exp(-bigram) for _, bigram in each) == pytest.approx(1)


def test_fifteen_megabytes_take_few_calls():
    """Numpy does all that grows with the text: so they take half a second."""
    train = np.random.default_rng(0).integers(0, 257, 15_000_000, np.uint16)
    assert calls(lambda: cross_entropies(train, train[: 257 * 64].reshape(64, 257), 257)) < 2_000
