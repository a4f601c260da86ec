"""Functional collectives, which DTensor uses: the operators that start them, and the one that waits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.measure.record.collective_bytes import nbytes, split_bytes
from moesys.measure.record.in_flight import InFlight
from moesys.parallel import comm
from moesys.parallel.comm import now

OPERATORS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "all_reduce_coalesced": "all_reduce",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
}
"""Operators of functional collectives, and the kind of each."""

DTENSOR = {"shard_dim_alltoall": "all_to_all"}
"""DTensor's operators that return when the result is there."""

PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors with memory of their own. Other types may have no address."""


class StartOperator:
    """An operator that starts a functional collective. Its last argument is the name of the group."""

    def __init__(self, packet: Any, kind: str, in_flight: InFlight):
        self._packet, self._kind, self._in_flight = packet, kind, in_flight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def __call__(self, x: Any, *arguments: Any) -> Any:
        inputs = x if isinstance(x, (list, tuple)) else [x]
        if any(type(one) not in PLAIN for one in inputs) or comm.is_kept(self._packet.default):
            return self._packet(x, *arguments)
        begin = now(inputs[0].device)
        out = self._packet(x, *arguments)
        group = dist.distributed_c10d._resolve_process_group(arguments[-1])
        size = nbytes(x) * (group.size() if self._kind == "all_gather" else 1)
        sent: tuple[int, ...] = ()
        if self._kind == "all_to_all":
            size, sent = split_bytes(x, arguments[1] if isinstance(arguments[1], list) else None, group.size())
        event = self._in_flight.start(self._kind, size, begin, group, sent=sent)
        if self._packet.__name__ in DTENSOR:
            self._in_flight.arrived([event], begin)
        else:  # coalesced collectives arrive together
            self._in_flight.tensors[(out[0] if isinstance(out, (list, tuple)) else out).data_ptr()] = event
        return out


class WaitOperator:
    """The operator that waits for the result of a functional collective."""

    def __init__(self, packet: Any, in_flight: InFlight):
        self._packet, self._in_flight = packet, in_flight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def __call__(self, x: Tensor) -> Tensor:
        event = self._in_flight.tensors.pop(x.data_ptr(), None) if type(x) in PLAIN else None
        if event is None:
            return self._packet(x)
        before = now(x.device)
        out = self._packet(x)
        self._in_flight.arrived([event], before)
        return out
