"""What a training step did, beside what it computed: collectives, and waits of the host for the device."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
"""Operators whose result, or its shape, the host must know: on a GPU it waits for the device."""

READING = ("tolist", "numpy", "cpu")
"""Methods of tensors that copy to the host; on CPU no operator shows it."""

MAKING = ("tensor", "as_tensor")
"""Functions that copy numbers from the host: a copy out of pageable memory waits for the device too."""


@dataclass
class Ran:
    """What all ranks did in one step.

    Attributes:
        collectives: by "kind over axes", what it was for and direction: calls of the first rank of each pipeline
            stage, and bytes (S of nccl-tests) summed over all ranks.
        waits: by file of the package, how often the host would wait for a GPU, on rank 0.
    """

    collectives: dict[str, str] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, by the file of the package that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in WAITING or _unknown_size(func, args, kwargs or {}):
            self.count()
        return func(*args, **(kwargs or {}))

    def count(self) -> None:
        """One wait of the function that called."""
        self.found[_caller()] += 1


def _unknown_size(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether only the device knows the size of what an operator gives."""
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        # One number put wherever a mask says is a `masked_fill`.
        return masked and (func is aten.index.Tensor or args[2].numel() > 1)
    return False


def _caller() -> str:
    """The innermost file of the package, or of a test, on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for name in ("moesys", "parallel", "kernels", "launchers", "benchmarks", "tests"):
            if name in path.parts and "site-packages" not in path.parts and path.name != Path(__file__).name:
                return "/".join(path.parts[len(path.parts) - 1 - path.parts[::-1].index(name) :])
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@contextmanager
def waits_counted() -> Iterator[Counter[str]]:
    """Count every wait of the host inside, in this thread."""
    with Waits() as waits, ExitStack() as stack:

        def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                waits.count()
                return plain(*arguments, **more)

            return call

        for name in READING:
            stack.enter_context(mock.patch.object(Tensor, name, counting(getattr(Tensor, name))))
        for name in MAKING:
            stack.enter_context(mock.patch.object(torch, name, counting(getattr(torch, name))))
        yield waits.found


def observe(trainer: Any) -> Ran | None:
    """What the next step of all ranks does, on rank 0; None elsewhere. Collective."""
    from moesys.measure.record.torch_collectives import record_torch_collectives
    from moesys.parallel import comm

    compiled = trainer.config.train.compile
    with record_torch_collectives(not compiled), comm.record() as events, waits_counted() as waits:
        trainer.train_step()
    mesh = trainer.mesh
    axes: dict[str, tuple[str, ...]] = {}
    for names, group in mesh.groups():
        axes.setdefault(group.group_name, names)
    if trainer.config.engine == "megatron":  # which has groups of its own beside these
        places = {tuple(dist.get_process_group_ranks(group)): names for names, group in mesh.groups()}
        for group in dist.distributed_c10d._world.pg_map:
            if (names := places.get(tuple(dist.get_process_group_ranks(group)))) and group is not dist.group.WORLD:
                axes.setdefault(group.group_name, names)
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for event in events:
        name = _name(event, axes)
        calls[name] += 1
        size[name] += event.bytes
    everyone: list[Any] = [None] * dist.get_world_size()
    leads = not any(place for axis, place in mesh.place.items() if axis != "pp")
    dist.all_gather_object(everyone, (calls if leads else None, size))
    if dist.get_rank():
        return None
    first = [calls for calls, _ in everyone if calls is not None]
    total: Counter[str] = sum((size for _, size in everyone), Counter())
    names = sorted({name for calls in first for name in calls} | set(total))
    found = {n: f"{' + '.join(str(calls[n]) for calls in first)} calls, {total[n]} bytes" for n in names}
    return Ran(found, dict(sorted(waits.items())))


def _name(event: Any, axes: dict[str, tuple[str, ...]]) -> str:
    if event.kind in ("send", "recv"):
        return f"{event.kind} over pp"
    tag = event.tag
    if tag.part == "step":
        members = "world"
    elif tag.part == "data" and event.group not in axes:
        members = "pp ends"  # of a tied embedding
    else:
        members = "·".join(axes.get(event.group, ("world",)))
    words = (event.kind, "over", members, tag.part, tag.level, "backward" if tag.backward else "")
    return " ".join(word for word in words if word)
