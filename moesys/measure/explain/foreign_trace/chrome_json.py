"""Reads traces in Chrome's JSON format, damaged ones too, as far as they are readable.

Files may be gzipped, cut short or damaged. They may hold invalid UTF-8, control characters, numbers as text, and a list
without its end, which the format allows.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from moesys.errors import MoesysError
from moesys.words import plural

GZIP = b"\x1f\x8b"
PIECE = 4096
"""Bytes that are decompressed at once: the most that is lost before a damaged place."""

ABOUT = ("distributedInfo", "baseTimeNanoseconds", "host_name", "hostname")
"""Keys beside the events that are searched for in a damaged file."""

LIMIT = 1e19
"""Largest time, size or rank. Nanoseconds since 1970 are below it."""


class TraceError(MoesysError):
    """A file is no trace of communication."""

    exit_code = 2


class TraceEvent(NamedTuple):
    """A complete event. `begin` and `end` are seconds on the clock of the trace."""

    name: str
    category: str
    begin: float
    end: float
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class TraceFile:
    """The contents of a file.

    Attributes:
        about: facts about its process.
        events: complete events.
        damage: a description of its damage; "" without any.
    """

    about: Mapping[str, Any]
    events: list[TraceEvent]
    damage: str


def read(path: Path) -> TraceFile:
    """The contents of the file at `path`.

    Raises:
        TraceError: it cannot be opened, or has no list of events.
    """
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    content, whole = _unpacked(raw)
    text = content.decode("utf-8-sig", "replace")
    about, values, lost = _parsed(text, path)
    found = [_event(value) for value in values]
    strange = sum(event is None for event in found)
    damage = []
    if lost or not whole:
        damage.append(f"it is damaged or cut short: {plural(len(values), 'event')} could be read")
    if strange:
        damage.append(f"{plural(strange, 'event')} without readable times {'is' if strange == 1 else 'are'} left out")
    return TraceFile(about, [event for event in found if isinstance(event, TraceEvent)], "; ".join(damage))


def number(value: Any) -> float | None:
    """A number, also from text; None for other values."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if isfinite(found) and abs(found) <= LIMIT else None


def count(value: Any) -> int | None:
    """A whole number of at least 0, also from text; None for other values."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def _unpacked(raw: bytes) -> tuple[bytes, bool]:
    """The decompressed bytes of a gzipped file up to its damage, and whether they are all; other bytes as they are."""
    if raw[:2] != GZIP:
        return raw, True
    parts: list[bytes] = []
    while raw[:2] == GZIP:  # a file may have several members
        member = zlib.decompressobj(wbits=31)
        for at in range(0, len(raw), PIECE):
            try:
                parts.append(member.decompress(raw[at : at + PIECE]))
            except zlib.error:
                return b"".join(parts), False
            if member.eof:
                break
        if not member.eof:
            return b"".join(parts), False
        raw = member.unused_data + raw[at + PIECE :]
    return b"".join(parts), True


def _parsed(text: str, path: Path) -> tuple[Mapping[str, Any], list[Any], bool]:
    """The facts about the process, the values in the list of events, and whether some were lost."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return _salvaged(text, path)
    events = value.get("traceEvents") if isinstance(value, dict) else value
    if not isinstance(events, list):
        raise TraceError(f"{path} is no trace: it has no list of events (traceEvents)\n    remedy: {REMEDY}")
    return (value if isinstance(value, dict) else {}), events, False


REMEDY = "give what torch.profiler.profile.export_chrome_trace wrote"
BARE = re.compile(r"\s*\[")
EVENTS = re.compile(r'"traceEvents"\s*:\s*\[')
BETWEEN = re.compile(r"[\s,]*")
NEXT = re.compile(r"\}\s*,\s*(?=\{)")
_DECODER = json.JSONDecoder(strict=False)


def _salvaged(text: str, path: Path) -> tuple[Mapping[str, Any], list[Any], bool]:
    """`_parsed` for a file that is no JSON as a whole: event by event. A list may lack its end."""
    bare = BARE.match(text)
    begin = bare or EVENTS.search(text)
    if begin is None:
        raise TraceError(f"{path} is no JSON trace, or was cut short before its events\n    remedy: {REMEDY}")
    values, at, lost = [], begin.end(), False
    while (at := _after(BETWEEN, text, at)) < len(text) and text[at] != "]":
        try:
            value, at = _DECODER.raw_decode(text, at)
            values.append(value)
        except (ValueError, RecursionError):
            lost, following = True, NEXT.search(text, at)
            if following is None:
                break
            at = following.end()
    lost = lost or (bare is None and at >= len(text))
    about = {key: value for key in ABOUT if (value := _value(text, key)) is not None}
    return about, values, lost


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _value(text: str, key: str) -> Any:
    """The value of the first key of this name, if readable."""
    found = re.search(rf'"{key}"\s*:\s*', text)
    try:
        return None if found is None else _DECODER.raw_decode(text, found.end())[0]
    except (ValueError, RecursionError):
        return None


def _event(value: Any) -> TraceEvent | bool | None:
    """The event; False for an event of another kind; None for unreadable times."""
    if not isinstance(value, dict) or value.get("ph") != "X":
        return False
    begin, lasts = number(value.get("ts")), number(value.get("dur", 0.0))
    if begin is None or lasts is None:
        return None
    facts = value.get("args")
    return TraceEvent(
        _text(value.get("name")),
        _text(value.get("cat")).lower(),
        begin / 1e6,
        (begin + max(0.0, lasts)) / 1e6,
        facts if isinstance(facts, dict) else {},
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
