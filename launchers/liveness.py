"""Finds the rank that does not answer, by the heartbeats that all ranks write (train/heartbeat.py), on any launcher.

A rank that hangs makes the *others* fail, which wait for it in vain. Their errors cannot name the missing rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesys.files import json_objects
from moesys.launchers.outcome import Outcome
from moesys.train.failure import FailureKind
from moesys.train.heartbeat import heartbeat_file, interval

STATES = {
    "T": "it is stopped, by SIGSTOP or Ctrl-Z: `kill -CONT {pid}` lets it go on",
    "t": "a debugger holds it",
    "D": "it waits for a disk or a network file system",
    "Z": "it has ended",
}
"""The kernel's letters for states in which a process writes no heartbeat, and what they mean."""


@dataclass(frozen=True)
class LastHeartbeat:
    """The last heartbeat of a rank.

    Attributes:
        seen_at: when the launcher saw it, in seconds.
        record: what the rank wrote.
        state: the kernel's letter for the state of its process, if it runs on this machine.
    """

    seen_at: float
    record: dict[str, Any]
    state: str = ""

    @property
    def who(self) -> str:
        """ "rank 2 (pid 4711, node gpu-03)"."""
        return f"rank {self.record['rank']} (pid {self.record['pid']}, node {self.record['host']})"

    @property
    def place(self) -> str:
        """ "step 12, saving a checkpoint, moesys/train/loop.py:58 in save"."""
        step = f"step {self.record['step']}" if self.record.get("step") else ""
        doing = "" if self.record.get("at") == "training" else self.record.get("at")
        return ", ".join(filter(None, (step, doing, self.record.get("where"))))


class LivenessMonitor:
    """Watches the heartbeats of `world` ranks that wait `timeout_s` seconds for each other."""

    def __init__(self, run_dir: Path, world: int, timeout_s: float, clock: Callable[[], float] = time.monotonic):
        self.run_dir, self.world, self.timeout_s = run_dir, world, timeout_s
        self._clock, self._begin, self._polled = clock, clock(), float("-inf")
        self._heartbeats: dict[int, LastHeartbeat] = {}
        self._reported: set[int] = set()

    def poll(self) -> list[str]:
        """Read the heartbeats when they are due; returns lines about ranks that have just been found silent."""
        now = self._clock()
        if now - self._polled < interval(self.timeout_s):
            return []
        self._polled = now
        for rank in range(self.world):
            self._read(rank, now)
        silent = {rank: last for rank, last in self._heartbeats.items() if self._is_silent(last, now)}
        news = [self._line(last, now) for rank, last in silent.items() if rank not in self._reported]
        self._reported = set(silent)
        # If all fell silent at once, the run folder does not answer, or this machine slept.
        return news if len(silent) < len(self._heartbeats) else []

    def explain(self, outcome: Outcome) -> Outcome:
        """`outcome`, with the missing rank named if it says that other ranks waited in vain."""
        if outcome.kind not in (FailureKind.TIMEOUT, FailureKind.LOST) or not self._heartbeats:
            return outcome
        newest = max(last.seen_at for last in self._heartbeats.values())
        silent = [last for last in self._heartbeats.values() if newest - last.seen_at > self.timeout_s / 2]
        waited = f"the other ranks waited {self.timeout_s:g} s for it (launch.timeout_s)"
        if silent:
            first = min(silent, key=lambda last: last.seen_at)
            why = self._why(first)
            return replace(outcome, message=f"{first.who} does not answer since {first.place}{why}; {waited}")
        if outcome.kind is not FailureKind.TIMEOUT:
            return outcome
        if missing := [rank for rank in range(self.world) if rank not in self._heartbeats]:
            return replace(outcome, message=f"rank {missing[0]} did not start; {waited}")
        away = [last for last in self._heartbeats.values() if not last.record.get("waits")]
        if 0 < len(away) < self.world:
            return replace(outcome, message=f"{away[0].who} did not come: it was at {away[0].place}; {waited}")
        return replace(outcome, message=self._link())

    def _read(self, rank: int, now: float) -> None:
        last = self._heartbeats.get(rank)
        record = next(json_objects(heartbeat_file(self.run_dir, rank)), None)
        if record is not None and {"rank", "pid", "host"} <= record.keys() and (last is None or record != last.record):
            self._heartbeats[rank] = LastHeartbeat(now, record)
        elif last is not None and last.record["host"] == os.uname().nodename:
            self._heartbeats[rank] = replace(last, state=state(last.record["pid"]) or last.state)

    def _is_silent(self, last: LastHeartbeat, now: float) -> bool:
        """True if the user must know: a local process that computes may have no time for heartbeats."""
        here = last.record["host"] == os.uname().nodename
        if last.record.get("ended"):  # rank 0 writes the report alone
            return False
        return now - last.seen_at > self.timeout_s / 4 and (last.state in STATES or not here)

    def _line(self, last: LastHeartbeat, now: float) -> str:
        return f"{last.who} has not answered for {now - last.seen_at:.0f} s, since {last.place}{self._why(last)}"

    def _why(self, last: LastHeartbeat) -> str:
        text = STATES.get(last.state, "").format(pid=last.record["pid"])
        return f": {text}" if text else ""

    def _link(self) -> str:
        places = {last.record["rank"]: last.place for last in self._heartbeats.values()}
        nodes = sorted({str(last.record.get("node_ip") or last.record["host"]) for last in self._heartbeats.values()})
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
