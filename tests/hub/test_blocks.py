"""Windows and MoE blocks of released models as our keys."""

import pytest

from moesys.hub.blocks import arranged, pattern

ARRANGED = [
    ([None] * 4, [False, True, True, True], {"layers": 4, "moe.first_dense": 1}),
    ([None] * 4, [False, True, False, True], {"layers": 4, "moe.every": 2}),
    ([None] * 5, [False, False, True, False, True], {"layers": 5, "moe.first_dense": 1, "moe.every": 2}),
    ([8] * 2, [True] * 2, {"layers": 2, "attention.window": 8}),
    ([None] * 2, [False] * 2, {"layers": 2}),
    (
        [128, None] * 2,
        [True] * 4,
        {"layers.count": 4, "layers.repeat": ["local moe", "attention moe"], "mixers.local.window": 128},
    ),
    (
        [None] * 4,
        [True, False, True, True],
        {"layers.count": 4, "layers.first": ["attention moe", "attention dense"], "layers.repeat": ["attention moe"]},
    ),
    (
        [None, 8, 16],
        [False, False, False],
        {
            "layers.count": 3,
            "layers.first": ["attention dense", "local8 dense"],
            "layers.repeat": ["local16 dense"],
            "mixers.local8.window": 8,
            "mixers.local16.window": 16,
        },
    ),
]


@pytest.mark.parametrize(("windows", "moe", "keys"), ARRANGED)
def test_the_shortest_keys_say_it(windows, moe, keys):
    assert arranged(windows, moe) == keys


def test_a_pattern_gives_its_words_back():
    words = ["a", "b", "c", "b", "c", "b"]
    first, repeat = pattern(words)
    assert (first, repeat) == (["a"], ["b", "c"])
