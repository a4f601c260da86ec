"""Jumps of torch's CPU generator: it moves forward without drawing the numbers between.

The generator is MT19937 (Matsumoto and Nishimura 1998, doi 10.1145/272991.272995): words s_k of 32 bits, of which 624
are its state, by a recurrence that is linear over GF(2). With φ its characteristic polynomial and
x^J mod φ = Σ p_m x^m, it is s_{J+i} = ⊕ s_{m+i} over the m with p_m = 1: a state far ahead is a sum of some of the
next 19937 states (Haramoto et al. 2008, doi 10.1287/ijoc.1070.0251). Polynomials over GF(2) are integers here: bit m is
the coefficient of x^m.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch

N, M, R, A = 624, 397, 31, 0x9908B0DF
"""Words of the state, distance of the recurrence, low bits of a word that it splits off, and its matrix."""

DEGREE = 32 * N - R

LEFT, NEXT, WORDS = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * N)
"""Bytes of a CPU generator's `get_state`: words left, 1 where the next draw makes new ones; the next word's place; the
words, 64 bits each. torch keeps this layout for old checkpoints; `works` asks whether it still does."""


def advance(generator: torch.Generator, words: int) -> None:
    """Move a fresh generator of the CPU forward by so many words, as if they had been drawn."""
    state = generator.get_state()
    raw = state.numpy()
    sequence = _sequence(raw[WORDS].view(np.uint64).astype(np.uint32))
    chosen = np.lib.stride_tricks.sliding_window_view(sequence, N)[_terms(words)]
    raw[WORDS] = np.bitwise_xor.reduce(chosen, axis=0).astype(np.uint64).view(np.uint8)
    raw[LEFT] = np.array([1], np.int32).view(np.uint8)
    raw[NEXT] = np.array([0], np.uint64).view(np.uint8)
    generator.set_state(state)


@cache
def works() -> bool:
    """Whether a jump of this torch's generator equals drawing, checked once on a short jump."""
    words, found = 3 * N + 5, []
    for jump in (advance, draw):
        generator = torch.Generator().manual_seed(1)
        jump(generator, words)
        found.append(torch.empty(2 * N).uniform_(generator=generator))
    return torch.equal(*found)


BLOCK = 2**20
"""Words that `draw` skips at once."""


def draw(generator: torch.Generator, words: int) -> None:
    """Move a generator forward by drawing: a number of 32 bits or less takes one word."""
    for begin in range(0, words, BLOCK):
        torch.empty(min(BLOCK, words - begin)).uniform_(generator=generator)


def _sequence(state: np.ndarray) -> np.ndarray:
    """The state's words and those that follow, as many as sums of states need: uint32."""
    words = np.empty(DEGREE + N, np.uint32)
    words[:N] = state
    for k in range(N, len(words), N - M):  # words nearer than that do not depend on each other
        size = min(N - M, len(words) - k)
        old, near, far = (words[k - N + i : k - N + i + size] for i in (0, 1, M))
        mixed = (old & np.uint32(0x80000000)) | (near & np.uint32(0x7FFFFFFF))
        words[k : k + size] = far ^ (mixed >> np.uint32(1)) ^ ((mixed & np.uint32(1)) * np.uint32(A))
    return words


@lru_cache(maxsize=256)
def _terms(words: int) -> np.ndarray:
    """The exponents of x^words mod φ."""
    power = 1
    for bit in bin(words)[2:]:
        power = _reduced(int("0".join(bin(power)[2:]), 2) << int(bit))
    raw = power.to_bytes(DEGREE // 8 + 1, "little")
    return np.flatnonzero(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little"))


@cache
def _characteristic() -> list[int]:
    """The exponents of φ but the largest, by theorem 5 of the paper on MT19937."""
    a = [A >> i & 1 for i in range(32)]
    long, short = (1 << n | 1 << n - (N - M) for n in (N, N - 1))
    found = _product(long, _power(short, R))
    for i in range(R):
        found ^= a[i] * _product(long, _power(short, R - 1 - i))
    found ^= a[R]
    return [i for i in range(DEGREE) if found >> i & 1]


def _reduced(polynomial: int) -> int:
    """A polynomial mod φ."""
    while high := polynomial >> DEGREE:
        polynomial ^= high << DEGREE
        for exponent in _characteristic():
            polynomial ^= high << exponent
    return polynomial


def _power(polynomial: int, exponent: int) -> int:
    found = 1
    for _ in range(exponent):
        found = _product(found, polynomial)
    return found


def _product(a: int, b: int) -> int:
    found = 0
    while b:
        low = b & -b
        found ^= a * low
        b ^= low
    return found
