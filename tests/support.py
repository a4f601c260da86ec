"""Helpers that tests import."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def changed(base: dict, *changes: dict) -> dict:
    """A deep copy of `base` with nested `changes` laid over it."""
    result = {k: changed(v) if isinstance(v, dict) else v for k, v in base.items()}
    for change in changes:
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = changed(result[key], value) if both else value
    return result


def calls(work: Callable[[], Any]) -> int:
    """How many functions `work` calls, of Python and of C: what it does, on whatever machine and under any load."""
    count, outer = 0, sys.getprofile()

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(outer)
    return count


def listening(pids: Iterable[int]) -> dict[str, set[int]]:
    """The addresses on which these processes listen for TCP connections → which of them do."""
    holders: dict[str, set[int]] = {}
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    holders.setdefault(os.readlink(descriptor), set()).add(pid)
    found: dict[str, set[int]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and (owners := holders.get(f"socket:[{words[9]}]")):
                found.setdefault(_address(words[1].partition(":")[0]), set()).update(owners)
    return found


def _address(text: str) -> str:
    """From the kernel's form, 32 bits at a time in this machine's order."""
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    address = ipaddress.ip_address(raw)
    return str(getattr(address, "ipv4_mapped", None) or address)
