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


UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def unit_of(size: float) -> tuple[str, int]:
    """The unit, and its bytes, that leaves one to three digits before the point."""
    return next(((unit, scale) for unit, scale in UNITS if size >= scale), UNITS[-1])


def size_text(size: float) -> str:
    """Bytes in words: "1.5 GiB", "12 B"."""
    unit, scale = unit_of(size)
    return f"{size / scale:,.1f} {unit}" if scale > 1 else f"{size:,.0f} B"
