"""Checkpoints of the Megatron engine, in the format of the native engine.

Every rank writes its part of each parameter and of its optimizer state, by this project's names. So a run continues
under any combination of parallelism, with or without the distributed optimizer, and under either engine. Nothing is
gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesys.megatron.names import Piece
from moesys.train import storage
from moesys.train.storage_parts import Parts

SLOTS = ("exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First element and sizes of a rectangular part of a tensor."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements start … stop − 1 of a contiguous tensor as rectangular parts, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    (first, skipped), (last, rest) = divmod(start, row), divmod(stop, row)
    if first == last or skipped:
        end = rest if first == last else row
        yield from (((first, *at), (1, *size)) for at, size in boxes(shape[1:], skipped, end))
        if first == last:
            return
        first += 1
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from (((last, *at), (1, *size)) for at, size in boxes(shape[1:], 0, rest))


def placed(piece: Piece, box: Box) -> Box | None:
    """The place of a rectangular part of Megatron's tensor in the whole parameter; None if it is outside of the piece.

    Rows outside of the piece are left out.
    """
    (first, *inner), (count, *sizes) = box
    rows = piece.rows or slice(0, first + count)
    begin, end = max(first, rows.start), min(first + count, rows.stop)
    if begin >= end:
        return None
    at = [index.start + offset for index, offset in zip(piece.index, (begin - rows.start, *inner), strict=True)]
    return tuple(at), (end - begin, *sizes)


class State:
    """The state of an engine for checkpoints, as views of its tensors: reading into them restores it.

    Args:
        pieces: every parameter of this rank, piece by piece.
        optimizer: Megatron's.
        buffers: of gates, by name.
        first: True if this rank is the first of its tensor group, and writes parameters that the others hold too.
    """

    def __init__(
        self, pieces: list[tuple[nn.Parameter, Piece]], optimizer: Any, buffers: dict[str, Tensor], first: bool
    ):
        self.pieces, self.buffers, self.first = pieces, buffers, first
        self.optimizers = [o for o in getattr(optimizer, "chained_optimizers", [optimizer]) if not o.is_stub_optimizer]
        self.kept = {id(p): kept for o in self.optimizers for p, kept in _kept(o)}

    def save(self, folder: Path) -> None:
        """Write everything to `folder`. Collective over the world."""
        model: dict[str, Any] = dict(self.buffers)
        slots: dict[str, Any] = {}
        for parameter, piece in self.pieces:
            # If two stages hold a weight, the first one writes its copy.
            mine = (piece.spread or self.first) and not getattr(parameter, "shared", False)
            if not mine or id(parameter) not in self.kept:
                continue
            start, main, state = self.kept[id(parameter)]
            _add(model, piece.name, piece, parameter, start, main)
            for slot in SLOTS:
                _add(slots, f"{piece.name}/{slot}", piece, parameter, start, state[slot])
            slots[f"{piece.name}/step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()
        storage.save({"model": model, "optimizer": slots}, folder)

    def slots(self) -> dict[str, Tensor]:
        """The optimizer's state of this rank's parameters, by "NAME/SLOT"."""
        held = [(piece.name, self.kept[id(p)][2]) for p, piece in self.pieces if id(p) in self.kept]
        return {f"{name}/{slot}": state[slot] for name, state in held for slot in SLOTS}

    def load_weights(self, folder: Path) -> set[str]:
        """Read the weights and gates' buffers alone from `folder`; returns as `load`. Collective over the world."""
        model: dict[str, Any] = dict(self.buffers)
        weights: dict[str, Any] = {}
        for parameter, piece in self.pieces:
            _add(weights, piece.name, piece, parameter, None, parameter.detach())
            if id(parameter) in self.kept:
                start, main, _ = self.kept[id(parameter)]
                _add(model, piece.name, piece, parameter, start, main)
        fresh = storage.load({"model": model}, folder, optional={f"model.{name}" for name in self.buffers})
        storage.load({"model": weights}, folder)
        return fresh

    def load(self, folder: Path) -> set[str]:
        """Read everything from `folder`; returns gates' buffers that are missing there. Collective over the world."""
        model: dict[str, Any] = dict(self.buffers)
        weights: dict[str, Any] = {}
        slots: dict[str, Any] = {}
        steps: dict[str, Tensor] = {}
        for parameter, piece in self.pieces:
            _add(weights, piece.name, piece, parameter, None, parameter.detach())
            if id(parameter) not in self.kept:
                continue
            start, main, state = self.kept[id(parameter)]
            _add(model, piece.name, piece, parameter, start, main)
            for slot in SLOTS:
                _add(slots, f"{piece.name}/{slot}", piece, parameter, start, state[slot])
            steps[f"{piece.name}/step"] = torch.zeros((), dtype=torch.float32)
        fresh = {f"model.{name}" for name in self.buffers}
        fresh = storage.load({"model": model, "optimizer": slots | steps}, folder, optional=fresh)
        storage.load({"model": weights}, folder)
        if steps:
            step = next(iter(steps.values()))
            for optimizer in self.optimizers:
                _count(optimizer.optimizer, step)
        return fresh


Kept = tuple[int | None, Tensor, dict[str, Any]]
"""The optimizer's part of a parameter: the flat index of its first element (None: all, in the parameter's shape); its
value in the optimizer; and its state."""


def _kept(optimizer: Any) -> Iterator[tuple[nn.Parameter, Kept]]:
    """The parameters of one of Megatron's optimizers on this rank, with their state, which is made if it is missing."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    if isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        for state in inner.state.values():
            state.setdefault("step", torch.zeros((), dtype=torch.float32))  # which `init_state_fn` forgets
    done = {id(p): group.get("step", 0) for group in inner.param_groups for p in group["params"]}
    for parameter, start, main in _mains(optimizer):
        yield parameter, (start, main.detach(), {"step": done[id(main)], **inner.state[main]})


def _count(inner: Any, step: Tensor) -> None:
    """Set an optimizer's count of steps: torch's optimizers keep it with each parameter, others with groups."""
    for group in inner.param_groups:
        if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
            group["step"] = int(step)
            continue
        for main in group["params"]:
            inner.state[main]["step"] = step.clone()


def _mains(optimizer: Any) -> Iterator[tuple[nn.Parameter, int | None, Tensor]]:
    """Every parameter, the index of its first element that this rank updates, and the updated tensor."""
    if hasattr(optimizer, "model_param_group_index_map"):
        for parameter, (group, number) in optimizer.model_param_group_index_map.items():
            start = optimizer._get_model_param_range_map(parameter)["param"].start
            yield parameter, start, optimizer.optimizer.param_groups[group]["params"][number]
    elif hasattr(optimizer, "float16_groups"):
        pairs = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameters, mains in pairs:
            yield from ((p, None, main) for p, main in zip(parameters, mains, strict=True))
        yield from ((p, None, p) for group in optimizer.fp32_from_fp32_groups for p in group)
    else:
        yield from ((p, None, p) for group in optimizer.optimizer.param_groups for p in group["params"])


def _add(to: dict[str, Any], key: str, piece: Piece, like: Tensor, start: int | None, value: Tensor) -> None:
    """Put the part of a piece in `value` into `to[key]`; `value` is like `like`, or its elements from `start` on."""
    parts = to.setdefault(key, Parts(piece.shape, value.dtype))
    if start is None:
        parts.held[tuple(at.start for at in piece.index)] = piece.view(value)
        return
    for box in boxes(tuple(like.shape), start, start + value.numel()):
        _, sizes = box
        here, value = value[: prod(sizes)].view(sizes), value[prod(sizes) :]
        if (where := placed(piece, box)) is not None:
            begin = max(0, (piece.rows.start if piece.rows else 0) - box[0][0])
            parts.held[where[0]] = here[begin : begin + where[1][0]]
