"""The rank that does not answer, found by the signs of life that all ranks write (train/beat.py), on any launcher.

A rank that hangs fails the *others*, which wait for it in vain. Their errors cannot say who was missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesys.files import json_objects
from moesys.launchers.failure import Outcome
from moesys.train.beat import beat_file, interval
from moesys.train.ending import Kind

STATES = {
    "T": "it is stopped, by SIGSTOP or Ctrl-Z: `kill -CONT {pid}` lets it go on",
    "t": "a debugger holds it",
    "D": "it waits for a disk or a network file system",
    "Z": "it has ended",
}
"""The kernel's letters for states in which a process gives no sign of life, and what they mean."""


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a rank: when the launcher saw it (s), and what it said."""

    seen: float
    said: dict[str, Any]
    state: str = ""

    @property
    def who(self) -> str:
        """ "rank 2 (pid 4711, node gpu-03)"."""
        return f"rank {self.said['rank']} (pid {self.said['pid']}, node {self.said['host']})"

    @property
    def place(self) -> str:
        """ "step 12, saving a checkpoint, moesys/train/loop.py:58 in save"."""
        step = f"step {self.said['step']}" if self.said.get("step") else ""
        doing = "" if self.said.get("at") == "training" else self.said.get("at")
        return ", ".join(filter(None, (step, doing, self.said.get("where"))))


class Pulse:
    """Watches the signs of life of `world` ranks that wait `timeout_s` seconds for each other."""

    def __init__(self, run_dir: Path, world: int, timeout_s: float, clock: Callable[[], float] = time.monotonic):
        self.run_dir, self.world, self.timeout_s = run_dir, world, timeout_s
        self._clock, self._begin, self._looked = clock, clock(), float("-inf")
        self._signs: dict[int, Sign] = {}
        self._told: set[int] = set()

    def look(self) -> list[str]:
        """Read the signs anew where it is time to; lines about ranks that have just been found silent."""
        now = self._clock()
        if now - self._looked < interval(self.timeout_s):
            return []
        self._looked = now
        for rank in range(self.world):
            self._read(rank, now)
        silent = {rank: sign for rank, sign in self._signs.items() if self._is_silent(sign, now)}
        news = [self._line(sign, now) for rank, sign in silent.items() if rank not in self._told]
        self._told = set(silent)
        # Where all fell silent at once, it is the run folder that does not answer, or this machine that slept.
        return news if len(silent) < len(self._signs) else []

    def explain(self, outcome: Outcome) -> Outcome:
        """`outcome`, told by the rank that did not come where it says that others waited for one in vain."""
        if outcome.kind not in (Kind.TIMEOUT, Kind.LOST) or not self._signs:
            return outcome
        newest = max(sign.seen for sign in self._signs.values())
        silent = [sign for sign in self._signs.values() if newest - sign.seen > self.timeout_s / 2]
        waited = f"the other ranks waited {self.timeout_s:g} s for it (launch.timeout_s)"
        if silent:
            first = min(silent, key=lambda sign: sign.seen)
            why = self._why(first)
            return replace(outcome, message=f"{first.who} does not answer since {first.place}{why}; {waited}")
        if outcome.kind is not Kind.TIMEOUT:
            return outcome
        if missing := [rank for rank in range(self.world) if rank not in self._signs]:
            return replace(outcome, message=f"rank {missing[0]} did not start; {waited}")
        away = [sign for sign in self._signs.values() if not sign.said.get("waits")]
        if 0 < len(away) < self.world:
            return replace(outcome, message=f"{away[0].who} did not come: it was at {away[0].place}; {waited}")
        return replace(outcome, message=self._link())

    def _read(self, rank: int, now: float) -> None:
        last = self._signs.get(rank)
        said = next(json_objects(beat_file(self.run_dir, rank)), None)
        if said is not None and {"rank", "pid", "host"} <= said.keys() and (last is None or said != last.said):
            self._signs[rank] = Sign(now, said)
        elif last is not None and last.said["host"] == os.uname().nodename:
            self._signs[rank] = replace(last, state=state(last.said["pid"]) or last.state)

    def _is_silent(self, sign: Sign, now: float) -> bool:
        """Whether the user is to hear of it: a process of this machine that computes may have no time for signs."""
        here = sign.said["host"] == os.uname().nodename
        if sign.said.get("ended"):  # rank 0 writes the report alone
            return False
        return now - sign.seen > self.timeout_s / 4 and (sign.state in STATES or not here)

    def _line(self, sign: Sign, now: float) -> str:
        return f"{sign.who} has not answered for {now - sign.seen:.0f} s, since {sign.place}{self._why(sign)}"

    def _why(self, sign: Sign) -> str:
        told = STATES.get(sign.state, "").format(pid=sign.said["pid"])
        return f": {told}" if told else ""

    def _link(self) -> str:
        places = {sign.said["rank"]: sign.place for sign in self._signs.values()}
        nodes = sorted({str(sign.said.get("node_ip") or sign.said["host"]) for sign in self._signs.values()})
        where = f"between {', '.join(nodes)}" if len(nodes) > 1 else f"on {nodes[0]}"
        listed = "".join(f"\n  rank {rank}: {place}" for rank, place in sorted(places.items())[:16])
        return (
            f"all {self.world} ranks run, and waited {self.timeout_s:g} s for each other (launch.timeout_s): "
            f"the network {where} is cut or too slow, or the ranks are in different collectives{listed}"
        )


def state(pid: int) -> str:
    """The kernel's letter for the state of a process of this machine; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
