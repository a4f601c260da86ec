"""The dimension of parallelism that a recorded collective serves: told by who started it, else by its group.

A group of ranks alone does not say it: an axis that spans the world has the world's own group, and where the ranks of
one axis are those of another, both may have one group.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from moesys.measure.step import Purpose
from moesys.parallel import comm
from moesys.parallel.comm import CollectiveRecord
from moesys.parallel.mesh import Ranks

STARTERS: tuple[tuple[str, Purpose], ...] = (
    ("torch.distributed.fsdp", "data"),
    ("torch.distributed.tensor", "tensor"),
    ("torch.distributed.pipelining", "pipeline"),
    ("megatron.core.pipeline_parallel", "pipeline"),
    ("megatron.core.tensor_parallel", "tensor"),
    ("megatron.core.distributed.param_and_grad_buffer", "data"),
    ("megatron.core.distributed.distributed_data_parallel", "data"),
    ("megatron.core.optimizer", "step"),
    ("moesys.train", "step"),
)
"""Modules whose code serves one purpose whatever group it uses."""

SPECIFIC: tuple[Purpose, ...] = ("tensor", "context", "pipeline", "data", "step")
"""The order in which a group's purposes count where nobody knows who started a collective: what data parallelism and
the step share is always told by its starter."""


def starter() -> Purpose | None:
    """The purpose of the innermost module among `STARTERS` whose code is running now; None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        for module, purpose in STARTERS:
            if name.startswith(module) and (len(name) == len(module) or name[len(module)] == "."):
                return purpose
        frame = frame.f_back  # type: ignore[assignment]
    return None


def purpose_of(event: CollectiveRecord, groups: Mapping[str, tuple[Purpose, ...]]) -> Purpose:
    """What a collective, or who started it, says that it is for; else what its group is for."""
    tag, served = event.tag, groups.get(event.group, ())
    if tag.level:
        return "expert"
    if tag == comm.STEP:
        return "step"
    if tag == comm.GRADIENTS:
        return "pipeline" if served == ("pipeline",) else "data"  # of a weight that two stages share
    if tag.part == comm.CONTEXT.part:
        return "context"
    if event.kind in ("send", "recv"):
        return "pipeline"  # over the world's own group, too
    if event.by:
        return next(purpose for purpose in SPECIFIC if purpose == event.by)
    return next((purpose for purpose in SPECIFIC if purpose in served), "step")


def purposes(mesh: Ranks) -> dict[str, tuple[Purpose, ...]]:
    """The purposes that each process group of the run serves, by its name: several where axes share it.

    What goes to experts says so itself.
    """
    found: dict[str, tuple[Purpose, ...]] = {}
    for axes, group in mesh.groups():
        purpose = _of_axes(mesh.active(*axes))
        if purpose is not None and purpose not in found.get(group.group_name, ()):
            found[group.group_name] = (*found.get(group.group_name, ()), purpose)
    return found


def _of_axes(axes: tuple[str, ...]) -> Purpose | None:
    """What communicates along axes of more than one rank."""
    if any("dp" in axis for axis in axes):
        return "data"
    if "pp" in axes:
        return "pipeline"
    if "tp" in axes:
        return "tensor"
    return "context" if "cp" in axes else None
