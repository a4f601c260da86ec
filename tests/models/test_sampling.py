"""The next token: greedy, by temperature and top-p as an independent computation has them, the same for a seed."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.models.sampling import Sampler, probabilities


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Probabilities by token, written out: the fewest most probable ones whose sum reaches top_p."""
    most = max(logits)
    weight = [math.exp((x - most) / temperature) for x in logits]
    chance = [w / math.fsum(weight) for w in weight]
    kept: dict[int, float] = {}
    for token in sorted(range(len(chance)), key=lambda token: -chance[token]):
        kept[token] = chance[token]
        if math.fsum(kept.values()) >= top_p:
            break
    return {token: share / math.fsum(kept.values()) for token, share in kept.items()}


@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=20, unique_by=lambda x: round(x, 3)),
    st.floats(0.2, 3),
    st.floats(0.01, 1),
)
def test_probabilities_are_those_of_an_independent_computation(logits, temperature, top_p):
    expected = nucleus(logits, temperature, top_p)
    sums = [math.fsum(sorted(nucleus(logits, temperature, 1.0).values(), reverse=True)[:n]) for n in range(len(logits))]
    if any(abs(total - top_p) < 1e-9 for total in sums):
        return  # rounding decides
    chance, token = probabilities(torch.tensor([logits], dtype=torch.float64), temperature, top_p)
    found = {int(t): float(c) for t, c in zip(token[0], chance[0], strict=True) if c > 0}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-12)


def test_temperature_0_takes_the_first_of_the_most_probable():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, -1.0, 4.0]])
    assert Sampler(0.0)(logits).tolist() == [1, 3]


def test_a_seed_draws_the_same_tokens_and_another_seed_others():
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))

    def drawn(seed: int) -> list[int]:
        sampler = Sampler(1.0, 0.9, seed)
        return [int(sampler(logits)) for _ in range(40)]

    assert drawn(7) == drawn(7) != drawn(8)


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = [random.Random(1).uniform(-2, 2) for _ in range(6)]
    expected, count = nucleus(logits, 0.7, 0.8), 4000
    drawn = Sampler(0.7, 0.8, 3)(torch.tensor([logits]).expand(count, -1)).bincount(minlength=6).tolist()
    for token, number in enumerate(drawn):
        share = expected.get(token, 0.0)
        assert abs(number / count - share) <= 4 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_entries_that_no_tokenizer_knows_are_never_drawn(temperature):
    logits = torch.tensor([[0.0, 1.0, 50.0, 50.0]])
    sampler = Sampler(temperature, known=2)
    assert {int(sampler(logits)) for _ in range(30)} <= {0, 1}
