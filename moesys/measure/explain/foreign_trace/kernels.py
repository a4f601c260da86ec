"""The collective that a kernel of a trace is, its ranks and its purpose. Needs no torch.

Told by NCCL's metadata where torch wrote it, else by the kernel's name; by the name of its group; and by what the
trace says about the process groups (`distributedInfo`).
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
"""Kernels that NCCL runs for messages, and for all-to-all, which it makes of them."""

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
"""Bytes of an element by NCCL's metadata; of all others one."""


MOST = 2**20
"""Ranks of the largest group whose members are written out."""


@dataclass(frozen=True)
class ProcessGroups:
    """A process as its trace tells of it: its rank, the world's size (0: not told), and its groups by name."""

    rank: int
    world: int
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, info: Mapping[str, Any], rank: int) -> ProcessGroups:
        """From `distributedInfo`."""
        told = info.get("pg_config")
        if isinstance(told, str):
            told = _json(told)
        groups = [g for g in told if isinstance(g, dict)] if isinstance(told, list) else []
        ranks = {str(g.get("pg_name")): ranks_of(g.get("ranks")) for g in groups}
        mine = {name: members for name, members in ranks.items() if rank in members}
        texts = {str(g.get("pg_name")): str(g.get("pg_desc") or "") for g in groups}
        return cls(rank, count(info.get("world_size")) or 0, mine, texts)

    def members(self, facts: Mapping[str, Any], given: Sequence[int]) -> tuple[int, ...]:
        """The ranks of a kernel's group, where `given` are those of all traces; empty if nothing tells them."""
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
        """Description of a group of more than this rank that is a pipeline's; "" if none is."""
        pattern = dict(GROUPS)["pipeline"]
        names = (text for name, text in self.descriptions.items() if len(self.ranks.get(name, ())) > 1)
        return next((text for text in names if pattern.search(text)), "")


def is_communication(name: str) -> bool:
    """Whether a kernel, or an annotation of gloo's, is the transfer of a collective or a message."""
    return bool(name.startswith("gloo:") or COMMUNICATION.search(name) or DEEP_EP.search(name))


def is_unnamed(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether it may be an all-to-all or a message, and nothing says which."""
    return bool(SEND_RECV.search(name)) and not facts.get("Collective name")


def is_nameless(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether it is some collective of which neither metadata, nor its name, nor its group's tells anything."""
    if not is_communication(name) or DEEP_EP.search(name) or kind_of(name, facts):
        return False
    group = " ".join(str(facts.get(key) or "") for key in ("Process Group Description", "Process Group Name"))
    return not any(pattern.search(group) for _, pattern in GROUPS)


def kind_of(name: str, facts: Mapping[str, Any], all_to_all: re.Pattern[str] | None = None) -> str:
    """The collective: as NCCL's metadata tells, else as the name does; "" if neither does.

    `all_to_all`: kernels that are, if no metadata contradict.
    """
    told = str(facts.get("Collective name") or "")
    if not told and all_to_all is not None and all_to_all.search(name):
        return "all_to_all"
    return next((kind for text in (told, name) for kind, pattern in KINDS if pattern.search(text)), "")


def purpose_of(kind: str, name: str, facts: Mapping[str, Any], description: str = "") -> Purpose:
    """The purpose of a collective: as its group is called, else that of most such collectives."""
    if DEEP_EP.search(name):
        return "expert"
    keys = ("Process Group Description", "Process Group Name")
    group = " ".join([*(str(facts.get(key) or "") for key in keys), description])
    for purpose, pattern in GROUPS:
        if pattern.search(group):
            return purpose
    return "expert" if kind == "all_to_all" else "pipeline" if kind == "send" else "data"


def size_of(kind: str, facts: Mapping[str, Any]) -> int:
    """Bytes as `CollectiveSpan` defines them; 0 if they are not told."""
    elements = [count(facts.get(f"{side} msg nelems")) or 0 for side in ("In", "Out")]
    width = WIDTHS.get(str(facts.get("dtype", "")).lower(), 1)
    return int((max(elements) if kind == "all_gather" else elements[0]) * width)


def ranks_of(told: Any) -> tuple[int, ...]:
    """Ranks from a list or its text; empty if it is none, or was cut short."""
    values = _json(told) if isinstance(told, str) else told
    if not isinstance(values, list):
        return ()
    found = [count(value) for value in values]
    ranks = tuple(rank for rank in found if rank is not None and rank < 2**31)
    return ranks if len(set(ranks)) == len(values) else ()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
