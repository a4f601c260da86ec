"""The purpose of a recorded collective: the dimension of parallelism that it serves.

The module that started it decides; its group decides only without a known module. A group alone is ambiguous: an axis
over all ranks uses the world's group, and two axes over the same ranks may share one.
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
"""Modules whose collectives have one purpose, whatever group they use."""

SPECIFIC: tuple[Purpose, ...] = ("tensor", "context", "pipeline", "data", "step")
"""The order in which a group's purposes count for an unknown module. Modules of data parallelism and of the step are
always known, so these come last."""


def starter() -> Purpose | None:
    """The purpose of the innermost running module among `STARTERS`; None without one."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        for module, purpose in STARTERS:
            if name.startswith(module) and (len(name) == len(module) or name[len(module)] == "."):
                return purpose
        frame = frame.f_back  # type: ignore[assignment]
    return None


def purpose_of(event: CollectiveRecord, groups: Mapping[str, tuple[Purpose, ...]]) -> Purpose:
    """The purpose in the tag of a collective, else that of the module that started it, else that of its group."""
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
    """The purposes of each process group of the run, by its name; several where axes share a group.

    Dispatch and combine are not included: their tags say so.
    """
    found: dict[str, tuple[Purpose, ...]] = {}
    for axes, group in mesh.groups():
        purpose = _of_axes(mesh.active(*axes))
        if purpose is not None and purpose not in found.get(group.group_name, ()):
            found[group.group_name] = (*found.get(group.group_name, ()), purpose)
    return found


def _of_axes(axes: tuple[str, ...]) -> Purpose | None:
    """The purpose of collectives along axes with more than one rank."""
    if any("dp" in axis for axis in axes):
        return "data"
    if "pp" in axes:
        return "pipeline"
    if "tp" in axes:
        return "tensor"
    return "context" if "cp" in axes else None
