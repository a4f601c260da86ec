"""Random numbers of tokens, the same on every layout of a run and in recomputation.

Each is a hash of (the token's number in the run, a column, a key). Nothing is drawn in an order, so no generator's
state must be kept equal across devices.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of splitmix64 (Steele et al. 2014)."""


def key(layer: int, purpose: str) -> int:
    """A key, int64, for the random numbers of one purpose in one layer."""
    digest = hashlib.blake2b(f"{layer}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(number_T: Tensor, columns: int, key: int) -> Tensor:
    """Uniform over (0, 1), without its ends: float32 [T, columns] for tokens `number_T` int64 [T]."""
    # 23 bits and a half: every value is a float32 and none is 0 or 1.
    return (_shift(_bits(number_T, columns, key), 41).to(torch.float32) + 0.5) * 2.0**-23


def normal(number_T: Tensor, columns: int, key: int) -> Tensor:
    """Standard normal, float32 [T, columns].

    The inverse of the distribution function, in float64: rounded to float32 it is the same on every
    device but for one value in millions.
    """
    level = (_shift(_bits(number_T, columns, key), 12).to(torch.float64) + 0.5) * 2.0**-52
    return torch.special.ndtri(level).to(torch.float32)


def _bits(number_T: Tensor, columns: int, key: int) -> Tensor:
    """64 random bits as int64 [T, columns]."""
    seed_T = _mix(number_T * _signed(_STEP) + key)
    column_C = torch.arange(1, columns + 1, device=number_T.device) * _signed(_STEP)
    return _mix(seed_T.unsqueeze(-1) + column_C)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; products wrap around. Of tensors as wide as tokens: in place where it can be."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(_signed(_FIRST))
    x = _shift(x, 27).bitwise_xor_(x).mul_(_signed(_SECOND))
    return _shift(x, 31).bitwise_xor_(x)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right that fills with zeros; torch's own repeats the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
