"""Numbers with their nouns."""

from __future__ import annotations

from moesys.words import plural


def test_one_is_singular() -> None:
    assert [plural(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
    assert [plural(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
