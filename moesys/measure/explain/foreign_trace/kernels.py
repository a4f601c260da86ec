"""Classifies the kernels of a trace: which collective one is, among which ranks, for which purpose. Needs no torch.

The sources are NCCL's metadata (if torch wrote them), the names of the kernel and of its group, and the trace's list of
process groups (`distributedInfo`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesys.measure.explain.foreign_trace.chrome_json import count
from moesys.measure.step import Purpose

COMMUNICATION = re.compile(r"^(nccl|rccl|mscclpp|ncclDev)|ncclKernel|ncclDevKernel|mscclKernel", re.IGNORECASE)
DEEP_EP = re.compile(
    r"deep_ep|(intranode|internode(_ll)?|low_latency|hybrid)[:_]*.*(dispatch|combine|notify)", re.IGNORECASE
)
SEND_RECV = re.compile(r"send_?recv", re.IGNORECASE)
"""NCCL's kernels for messages, and for all-to-all, which NCCL builds from messages."""

KINDS = (
    ("all_to_all", re.compile(r"all_?to_?all", re.IGNORECASE)),
    ("all_gather", re.compile(r"all_?gather", re.IGNORECASE)),
    ("reduce_scatter", re.compile(r"reduce_?scatter", re.IGNORECASE)),
    ("all_reduce", re.compile(r"all_?reduce", re.IGNORECASE)),
    ("broadcast", re.compile(r"broadcast", re.IGNORECASE)),
    ("send", re.compile(r"send|recv", re.IGNORECASE)),
)
GROUPS: tuple[tuple[Purpose, re.Pattern[str]], ...] = (
    ("data", re.compile(r"(^|[^a-z])(e?dp|expert_dp|fsdp|data|hsdp|shard|replicate)", re.IGNORECASE)),
    ("expert", re.compile(r"(^|[^a-z])(ep|moe|expert)", re.IGNORECASE)),
    ("tensor", re.compile(r"(^|[^a-z])(e?tp|tensor|model_parallel|sp)($|[^a-z])", re.IGNORECASE)),
    ("context", re.compile(r"(^|[^a-z])(cp|context|ring)", re.IGNORECASE)),
    ("pipeline", re.compile(r"(^|[^a-z])(pp|pipe)", re.IGNORECASE)),
)
WIDTHS = {
    **dict.fromkeys(("double", "float64", "long", "int64"), 8),
    **dict.fromkeys(("float", "float32", "int", "int32"), 4),
    **dict.fromkeys(("bfloat16", "half", "float16", "short"), 2),
}
"""Bytes of an element, by the type in NCCL's metadata; 1 for all others."""

MOST = 2**20
"""Ranks of the largest group whose members are listed."""


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups of one rank, from its trace.

    Attributes:
        world: ranks of the run; 0 if unknown.
        ranks, descriptions: members and description of each group, by name.
    """

    rank: int
    world: int
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, info: Mapping[str, Any], rank: int) -> ProcessGroups:
        """The groups in `distributedInfo`."""
        config = info.get("pg_config")
        if isinstance(config, str):
            config = _json(config)
        groups = [g for g in config if isinstance(g, dict)] if isinstance(config, list) else []
        ranks = {str(g.get("pg_name")): ranks_of(g.get("ranks")) for g in groups}
        mine = {name: members for name, members in ranks.items() if rank in members}
        texts = {str(g.get("pg_name")): str(g.get("pg_desc") or "") for g in groups}
        return cls(rank, count(info.get("world_size")) or 0, mine, texts)

    def members(self, facts: Mapping[str, Any], given: Sequence[int]) -> tuple[int, ...]:
        """The ranks of a kernel's group; empty if unknown. `given`: the ranks of all traces."""
        listed = ranks_of(facts.get("Process Group Ranks"))
        if self.rank in listed:
            return listed
        name = facts.get("Process Group Name")
        if name is not None and str(name) in self.ranks:
            return self.ranks[str(name)]
        size = count(facts.get("Group size"))
        if size is not None:
            if size == (self.world or len(given)) and size <= MOST:
                return tuple(range(size)) if self.world else tuple(given)
            return ()
        several = {members for members in self.ranks.values() if len(members) > 1}
        return next(iter(several)) if name is None and len(several) == 1 else ()

    def piped(self) -> str:
        """The description of a pipeline group with more than one rank; "" without one."""
        pattern = dict(GROUPS)["pipeline"]
        names = (text for name, text in self.descriptions.items() if len(self.ranks.get(name, ())) > 1)
        return next((text for text in names if pattern.search(text)), "")


def is_communication(name: str) -> bool:
    """Whether a kernel, or an annotation of gloo, is a collective or a message."""
    return bool(name.startswith("gloo:") or COMMUNICATION.search(name) or DEEP_EP.search(name))


def is_unnamed(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a kernel is an all-to-all or a message, and no metadata say which."""
    return bool(SEND_RECV.search(name)) and not facts.get("Collective name")


def is_nameless(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a kernel is a collective of unknown kind: metadata, name and group do not say."""
    if not is_communication(name) or DEEP_EP.search(name) or kind_of(name, facts):
        return False
    group = " ".join(str(facts.get(key) or "") for key in ("Process Group Description", "Process Group Name"))
    return not any(pattern.search(group) for _, pattern in GROUPS)


def kind_of(name: str, facts: Mapping[str, Any], all_to_all: re.Pattern[str] | None = None) -> str:
    """The kind of collective in NCCL's metadata, else in the name; "" if unknown.

    all_to_all: pattern of kernels without metadata that are all-to-all.
    """
    named = str(facts.get("Collective name") or "")
    if not named and all_to_all is not None and all_to_all.search(name):
        return "all_to_all"
    return next((kind for text in (named, name) for kind, pattern in KINDS if pattern.search(text)), "")


def purpose_of(kind: str, name: str, facts: Mapping[str, Any], description: str = "") -> Purpose:
    """The purpose in the group's name or description, else the usual one of this kind."""
    if DEEP_EP.search(name):
        return "expert"
    keys = ("Process Group Description", "Process Group Name")
    group = " ".join([*(str(facts.get(key) or "") for key in keys), description])
    for purpose, pattern in GROUPS:
        if pattern.search(group):
            return purpose
    return "expert" if kind == "all_to_all" else "pipeline" if kind == "send" else "data"


def size_of(kind: str, facts: Mapping[str, Any]) -> int:
    """Bytes as `CollectiveSpan` defines them; 0 if unknown."""
    elements = [count(facts.get(f"{side} msg nelems")) or 0 for side in ("In", "Out")]
    width = WIDTHS.get(str(facts.get("dtype", "")).lower(), 1)
    return int((max(elements) if kind == "all_gather" else elements[0]) * width)


def ranks_of(value: Any) -> tuple[int, ...]:
    """Ranks from a list or its text; empty for other values, or a list that was cut short."""
    values = _json(value) if isinstance(value, str) else value
    if not isinstance(values, list):
        return ()
    found = [count(one) for one in values]
    ranks = tuple(rank for rank in found if rank is not None and rank < 2**31)
    return ranks if len(set(ranks)) == len(values) else ()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
