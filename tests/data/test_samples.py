from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.data.samples import Samples, permuted

TOKENS = np.arange(1003, dtype=np.uint16)


@given(st.integers(1, 400), st.integers(0, 2**70), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_an_epoch_visits_every_window_once(size, seed, epoch):
    assert sorted(permuted(place, size, seed, epoch) for place in range(size)) == list(range(size))


def test_permutations_differ_between_seeds_and_epochs_and_are_even():
    size, orders = 24, 6000
    firsts = np.array([permuted(0, size, seed, epoch) for seed in range(orders // 4) for epoch in range(4)])
    counts = np.bincount(firsts, minlength=size)
    chi_square = ((counts - orders / size) ** 2 / (orders / size)).sum()
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


def test_neighbours_do_not_stay_neighbours():
    size = 2000
    order = np.array([permuted(place, size, 7, 0) for place in range(size)])
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.1
    assert abs(np.corrcoef(order, [permuted(place, size, 7, 1) for place in range(size)])[0, 1]) < 0.1


def test_the_order_is_the_same_for_ever():
    """A change here would change every run that is resumed."""
    assert [permuted(place, 10, 0, 0) for place in range(10)] == [0, 9, 8, 5, 3, 1, 6, 2, 7, 4]


def test_windows_share_their_label_token_alone():
    samples = Samples(TOKENS, 10)
    assert len(samples) == 100
    windows = np.stack(list(samples))
    assert windows.shape == (100, 11)
    assert windows.dtype == np.int64
    assert windows[:, :-1].ravel().tolist() == list(range(1000))
    assert (windows[:-1, -1] == windows[1:, 0]).all()
    assert windows[-1, -1] == 1000


def test_an_epoch_of_samples_is_all_windows_in_another_order():
    samples, plain = Samples(TOKENS, 10, seed=3), Samples(TOKENS, 10)
    for epoch in range(3):
        found = [samples[number] for number in range(100 * epoch, 100 * (epoch + 1))]
        assert sorted(map(tuple, found)) == sorted(map(tuple, plain))
        assert list(map(tuple, found)) != list(map(tuple, plain))
    assert samples[0].tolist() != samples[100].tolist() or samples[1].tolist() != samples[101].tolist()


def test_a_sample_hangs_on_seed_and_number_alone():
    one, other = Samples(TOKENS, 10, seed=3), Samples(TOKENS.astype(np.int64), 10, seed=3)
    numbers = [5, 250, 0, 99, 250]
    assert [one[n].tolist() for n in numbers] == [other[n].tolist() for n in reversed(numbers)][::-1]
    assert [one[n].tolist() for n in range(9)] != [Samples(TOKENS, 10, seed=4)[n].tolist() for n in range(9)]


def test_batches_follow_each_other():
    samples = Samples(TOKENS, 10, seed=0)
    assert [*samples.batch(1, 4), *samples.batch(2, 4)] == list(range(8))


def test_held_out_windows_lie_in_order():
    assert Samples(TOKENS, 10)[7].tolist() == list(range(70, 81))


@pytest.mark.parametrize(("length", "windows"), [(11, 1), (20, 1), (21, 2)])
def test_the_least_that_makes_windows(length, windows):
    assert len(Samples(TOKENS[:length], 10)) == windows


def test_too_few_tokens_and_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="10 tokens hold no window of 11"):
        Samples(TOKENS[:10], 10)
    with pytest.raises(IndexError):
        Samples(TOKENS, 10)[-1]


def test_a_sample_is_its_own_copy():
    samples = Samples(TOKENS.astype(np.int64), 10)
    samples[0][:] = -1
    assert samples[0].tolist() == list(range(11))
