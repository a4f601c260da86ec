"""The native engine's choice of a device."""

from __future__ import annotations

import pytest

from moesys.errors import MoesysError
from moesys.train.native import own_gpu


@pytest.mark.parametrize(("rank", "visible", "own"), [(0, 1, 0), (3, 1, 0), (3, 4, 3), (3, 2, 1)])
def test_a_worker_takes_the_gpu_of_its_number_among_those_it_sees(rank, visible, own):
    assert own_gpu(rank, visible) == own


def test_a_worker_without_a_gpu_says_so():
    with pytest.raises(MoesysError, match="worker 3 of this node computes on a GPU"):
        own_gpu(3, 0)
