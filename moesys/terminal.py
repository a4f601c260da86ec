"""Output of the `moesys` command to a terminal or pipe, whatever characters that takes."""

from __future__ import annotations

import codecs
import io
import sys

PLAIN = {
    "…": "...", "·": ".", "×": "x", "–": "-", "—": "-", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "−": "-",
    "±": "+-", "µ": "u", "μ": "u", "α": "alpha", "β": "beta", "∝": "~", "²": "2", "³": "3", "⁹": "9", "°": "deg",
    "‘": "'", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
"""Stand-ins for characters that the other end cannot show."""


def degrade(error: UnicodeError) -> tuple[str, int]:
    """The handler of encoding errors `moesys`: near characters of ASCII, else a question mark."""
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
    """Let standard output and error degrade what their encoding lacks, instead of ending the command."""
    codecs.register_error("moesys", degrade)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="moesys")
