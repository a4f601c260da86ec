"""Numbers in messages: with their nouns, and those that would do."""

from __future__ import annotations

from math import isqrt


def plural(count: int, noun: str, several: str = "") -> str:
    """ "1 node", "2 nodes"; "1 process", "2 processes" where `several` says so."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]
