"""Bytes of the collectives that torch starts, from the arguments of `ProcessGroup`'s methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

Sizes = Callable[..., tuple[int, tuple[int, ...]]]
"""(group, a method's arguments) → bytes that this rank contributes, and bytes to each rank (empty if unknown)."""


def nbytes(x: Any) -> int:
    """Bytes of a tensor of any shape, or of all tensors in nested lists."""
    return sum(map(nbytes, x)) if isinstance(x, (list, tuple)) else int(x.nbytes)


def _own(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """Bytes of the first argument."""
    return nbytes(arguments[0]), ()


def _gathered(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """The larger of output and input: the bytes of all ranks together."""
    return max(map(nbytes, arguments[:2])), ()


def _to_root(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """This rank's bytes times the ranks. Only the root has an output."""
    return group.size() * nbytes(arguments[1]), ()


def _from_root(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """This rank's bytes times the ranks. Only the root has an input."""
    return group.size() * nbytes(arguments[0]), ()


def _split(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    return split_bytes(arguments[1], arguments[3], group.size())


def split_bytes(x: Tensor, rows: list[int] | None, ranks: int) -> tuple[int, tuple[int, ...]]:
    """Bytes of x [rows, …], and of the `rows` of it for each rank; equal parts without `rows`."""
    if not rows:
        return x.nbytes, (x.nbytes // ranks,) * ranks
    per_row = x.nbytes // max(1, len(x))
    return x.nbytes, tuple(n * per_row for n in rows)


def _listed(group: dist.ProcessGroup, *arguments: Any) -> tuple[int, tuple[int, ...]]:
    """Bytes of a list with a tensor for each rank."""
    sent = tuple(map(nbytes, arguments[1]))
    return sum(sent), sent


METHODS: dict[str, tuple[str, Sizes]] = {
    "allreduce": ("all_reduce", _own),
    "allreduce_coalesced": ("all_reduce", _own),
    "broadcast": ("broadcast", _own),
    "reduce": ("reduce", _own),
    "allgather": ("all_gather", _gathered),
    "allgather_coalesced": ("all_gather", _gathered),
    "reduce_scatter": ("reduce_scatter", _gathered),
    "gather": ("gather", _to_root),
    "scatter": ("scatter", _from_root),
    "alltoall": ("all_to_all", _listed),
    "send": ("send", _own),
    "recv": ("recv", _own),
    # Names until torch 2.12, and names since.
    "_allgather_base": ("all_gather", _gathered),
    "all_gather_single": ("all_gather", _gathered),
    "allgather_into_tensor_coalesced": ("all_gather", _gathered),
    "all_gather_single_coalesced": ("all_gather", _gathered),
    "_reduce_scatter_base": ("reduce_scatter", _gathered),
    "reduce_scatter_single": ("reduce_scatter", _gathered),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _gathered),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _gathered),
    "alltoall_base": ("all_to_all", _split),
    "all_to_all_single": ("all_to_all", _split),
}
"""Methods of `ProcessGroup`: the kind of collective, and its bytes. Their names differ between versions of torch."""
