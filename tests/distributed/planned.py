"""Collectives as they are planned, beside those that a step made."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ran import Ran

from moesys.config import Config
from moesys.data.corpus import vocab_size
from moesys.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, resolve
from moesys.parallel.dimension import step_shape, traffic
from moesys.parallel.gradient_sync import settled

Group = tuple[tuple[int, ...], ...]
"""All groups of ranks along some axes: two names of the same ranks are one group."""

ROWS = ("all_to_all", "all_to_all_weights", "all_gather_names", "all_gather_weights", "reduce_scatter_weights")
"""Kinds whose sizes depend on where tokens go, unless none is dropped."""


@dataclass
class Moved:
    """Calls by pipeline rank, and bytes (S of nccl-tests) over all ranks."""

    calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    bytes: float = 0.0

    def __str__(self) -> str:
        return f"{' + '.join(str(self.calls[rank]) for rank in sorted(self.calls))} calls, {self.bytes:.0f} bytes"


Table = dict[tuple[str, str, Group], Moved]
"""By kind, level and groups."""


def planned(config: Config) -> Table:
    """The collectives of a step, as the dry run adds them up."""
    degrees, problems = resolve(config)
    assert degrees is not None, problems
    vocabulary = vocab_size(config)
    as_run = settled(config, degrees, vocabulary)
    table: Table = defaultdict(Moved)
    for rank in range(degrees.pp):
        for shape in step_shape(as_run, degrees, vocabulary, rank):
            for move in traffic(shape):
                entry = table[move.kind, move.level, groups(degrees, move.axes)]
                entry.calls[rank] += move.calls
                entry.bytes += move.bytes * move.calls * degrees.stage
    return table


def counted(config: Config, ran: Ran) -> Table:
    """The collectives of a step, as they were recorded; each message once, on the rank that sends it."""
    degrees, _ = resolve(config)
    assert degrees is not None
    table: Table = defaultdict(Moved)
    for name, text in ran.collectives.items():
        kind, _, where = name.partition(" over ")
        if kind == "recv":
            continue
        words, (calls, size) = where.split(), text.split(" calls, ")
        level = next((word for word in words[1:] if word in ("inter", "intra", "ends")), "")
        axes = ("ep", "etp") if level in ("inter", "intra") else tuple(words[0].split("·"))
        entry = table[kind, level, groups(degrees, axes)]
        for rank, count in enumerate(calls.split(" + ")):
            entry.calls[rank] += int(count)
        entry.bytes += int(size.removesuffix(" bytes"))
    return table


def groups(degrees: Degrees, axes: tuple[str, ...]) -> Group:
    """The groups of ranks along `axes`; "world": all ranks."""
    if axes == ("world",):
        return (tuple(range(degrees.world)),)
    mesh = EXPERT_AXES if set(axes) <= set(EXPERT_AXES) else DENSE_AXES
    return tuple(map(tuple, degrees.groups(axes, mesh)))


def differences(config: Config, ran: Ran) -> list[str]:
    """A line for each collective that was not planned as it was counted.

    Where tokens are dropped, or choose how many experts they go to, rows are at most as many as planned.
    """
    plan, count, lines = planned(config), counted(config, ran), []
    for key in sorted(plan.keys() | count.keys()):
        kind, level, members = key
        ours, theirs = plan.get(key, Moved()), count.get(key, Moved())
        same = abs(ours.bytes - theirs.bytes) <= 1e-9 * theirs.bytes
        if kind in ROWS and ragged(config):
            same = 0 < theirs.bytes <= ours.bytes
        if not same or {r: n for r, n in ours.calls.items() if n} != {r: n for r, n in theirs.calls.items() if n}:
            over = f"{kind} {level} over {len(members)} × {list(members[0])}"
            lines.append(f"    {over}: {theirs} counted, and {ours} planned")
    return lines


def ragged(config: Config) -> bool:
    """Whether how many rows travel depends on what tokens choose."""
    moe: Any = config.model.moe
    if moe is None or moe.gate.force == "balanced":
        return False
    dropping = moe.capacity_factor is not None and not moe.pad_to_capacity
    return dropping or moe.zero_computation or getattr(moe.gate, "second", "always") == "random"
