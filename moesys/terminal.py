"""Lets the output of the `moesys` command reach any terminal or pipe, whatever its encoding."""

from __future__ import annotations

import codecs
import io
import sys

PLAIN = {
    "…": "...", "·": ".", "×": "x", "–": "-", "—": "-", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "−": "-",
    "±": "+-", "µ": "u", "μ": "u", "α": "alpha", "β": "beta", "∝": "~", "²": "2", "³": "3", "⁹": "9", "°": "deg",
    "‘": "'", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
"""Substitutes for characters that the other end cannot show."""


def degrade(error: UnicodeError) -> tuple[str, int]:
    """The handler of encoding errors `moesys`: similar ASCII characters, else a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(plain, error.object[error.start : error.end])), error.end


def plain(character: str) -> str:
    """The character in ASCII."""
    if "\u2500" <= character <= "\u257f":  # drawn boxes
        return {"─": "-", "━": "-", "│": "|", "┃": "|"}.get(character, "+")
    if "\u2800" <= character <= "\u28ff":  # spinners
        return "*"
    return PLAIN.get(character, "?")


def forgive() -> None:
    """Let standard output and error replace characters that their encoding lacks, instead of raising."""
    codecs.register_error("moesys", degrade)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="moesys")
