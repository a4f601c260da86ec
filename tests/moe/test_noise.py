"""Random numbers of tokens: distributed as they should be, and bound to nothing but number, column and key."""

from __future__ import annotations

import pytest
import torch

from moesys.moe.noise import key, normal, uniform

N = torch.arange(20000)


def splitmix(number: int, column: int, k: int) -> int:
    """The same bits in Python's whole numbers, from the definition of splitmix64."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    seed = mix((number * 0x9E3779B97F4A7C15 + k) & mask)
    return mix((seed + (column + 1) * 0x9E3779B97F4A7C15) & mask)


@pytest.mark.parametrize("number", [0, 1, 12345, 2**40 + 7])
def test_bits_are_splitmix64(number):
    k = key(3, "noise")
    found = uniform(torch.tensor([number]), 4, k)[0]
    expected = [((splitmix(number, c, k) >> 41) + 0.5) / 2**23 for c in range(4)]
    assert found.dtype == torch.float32 and found.tolist() == expected


def test_distributions():
    u, z = uniform(N, 3, key(0, "a")), normal(N, 3, key(0, "a"))
    assert u.min() > 0 and u.max() < 1
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    # The largest distance to the distribution function, of 60,000 numbers, stays below 0.01.
    assert (u.double().flatten().quantile(levels) - levels).abs().max() < 0.01
    assert (torch.special.ndtr(z.double().flatten().quantile(levels)) - levels).abs().max() < 0.01
    assert z.mean().abs() < 0.02 and abs(z.std() - 1) < 0.02


def test_columns_keys_and_neighbours_are_unrelated():
    u = uniform(N, 2, key(0, "a"))
    other = uniform(N, 2, key(1, "a"))
    pairs = [u[:, 0], u[:, 1], other[:, 0], u[:, 0].roll(1)]
    correlation = torch.corrcoef(torch.stack(pairs)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.03
    assert key(0, "a") != key(0, "b") != key(1, "b")


def test_a_token_has_its_numbers_wherever_it_stands():
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for draw in (uniform, normal):
        assert torch.equal(draw(N[:100], 5, 7)[order], draw(N[:100][order], 5, 7))
        assert torch.equal(draw(N[:100], 5, 7)[:, :3], draw(N[:100], 3, 7))
