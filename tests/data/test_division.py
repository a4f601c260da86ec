from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.data.division import divide, hashed_names, hashed_numbers

SHARES = st.floats(0.001, 0.999)


def test_names_are_held_out_by_their_hash():
    names = [f"file{n}.txt" for n in range(2000)]
    found = hashed_names(names, 0.05)
    digests = [int(blake2b(name.encode(), digest_size=8).hexdigest(), 16) for name in names]
    assert found.tolist() == [digest / 2**64 < 0.05 for digest in digests]
    assert 0.03 < found.mean() < 0.07


def test_numbers_are_held_out_by_splitmix64():
    def splitmix(n):
        z = (n + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    found = hashed_numbers(2000, 0.05)
    assert found.tolist() == [splitmix(n) < int(0.05 * 2**64) for n in range(2000)]
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the generator's published first output from state 0
    assert 0.03 < found.mean() < 0.07


def test_more_documents_move_none_of_the_others():
    names = [f"file{n}.txt" for n in range(500)]
    assert hashed_names(names, 0.1)[::-1].tolist() == hashed_names(names[::-1], 0.1).tolist()
    assert hashed_numbers(700, 0.1)[:500].tolist() == hashed_numbers(500, 0.1).tolist()


def test_the_hash_decides_when_it_meets_the_share():
    hashed = hashed_names([f"file{n}.txt" for n in range(500)], 0.1)
    division = divide(np.full(500, 100), hashed, 0.1)
    assert division.heldout.tolist() == hashed.tolist()
    assert division.cut == 0


def test_the_last_documents_are_held_out_when_the_hash_holds_out_none():
    division = divide(np.full(20, 100), np.zeros(20, bool), 0.1)
    assert np.flatnonzero(division.heldout).tolist() == [18, 19]
    assert division.cut == 0
    assert division.totals(np.full(20, 100)) == (1800, 200)


def test_all_hashed_is_no_better_than_none():
    division = divide(np.full(20, 100), np.ones(20, bool), 0.1)
    assert np.flatnonzero(division.heldout).tolist() == [18, 19]


def test_a_tiny_document_is_not_the_held_out_part():
    sizes = np.array([50_000, 10, 50_000])
    division = divide(sizes, np.array([False, True, False]), 0.05)
    assert division.totals(sizes) == (95_009, 5_001) or division.totals(sizes) == (95_010, 5_000)


def test_a_single_document_is_cut_at_the_share():
    division = divide(np.array([1000]), np.array([False]), 0.05)
    assert division.heldout.tolist() == [True]
    assert division.cut == 950
    assert division.totals(np.array([1000])) == (950, 50)


@given(st.lists(st.integers(0, 1000), min_size=1).filter(lambda sizes: sum(sizes) >= 2), SHARES, st.data())
def test_neither_side_is_empty_and_both_get_their_share(sizes, share, data):
    hashed = np.array(data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))))
    sizes = np.array(sizes)
    division = divide(sizes, hashed, share)
    train, heldout = division.totals(sizes)
    assert train + heldout == sizes.sum()
    assert min(train, heldout) >= 1
    # The exact share is a whole number of units: one may be missing.
    assert heldout >= 0.25 * share * sizes.sum() - 1
    assert train >= 0.25 * (1 - share) * sizes.sum() - 1
    if division.cut:
        assert 0 < division.cut < sizes[division.first]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_the_first_held_out_document_alone_is_cut(share):
    division = divide(np.array([10_000, 10_000]), np.zeros(2, bool), share)
    cuts = [division.cut_of(document) for document in np.flatnonzero(division.heldout)]
    assert cuts[0] == division.cut and not any(cuts[1:])
