"""Sizes in bytes, and the names of collectives and groups, on the command line. Needs no torch."""

from __future__ import annotations

import argparse

COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send_recv")
GROUPS = ("intra", "inter", "expert", "world")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def size(text: str) -> int:
    """The bytes in "4096", "1K", "64M" or "1G", by powers of 1024."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in UNITS or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, or 1K, 64M, 1G")
    return int(number) * UNITS[unit]


def human(size: int) -> str:
    """Bytes as text, in the largest unit with a number of at least one."""
    for unit in ("G", "M", "K"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.4g} {unit}iB"
    return f"{size} B"
