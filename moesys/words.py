"""Numbers with their nouns in singular or plural."""

from __future__ import annotations


def plural(count: int, noun: str, several: str = "") -> str:
    """ "1 node", "2 nodes"; "1 process", "2 processes" where `several` says so."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"
