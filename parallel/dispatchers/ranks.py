"""The ranks that share the experts of a layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, eq=False)
class ExpertRanks:
    """The ranks that share the experts of a layer, as dispatchers are built on them.

    Attributes:
        group: R = ep · etp ranks; rank i·etp + j holds slice j of the experts i·E/ep … (i+1)·E/ep − 1.
        ep, etp: how many ways the experts, and each expert's inner size, are split.
        device: the device of their tensors.
        timeout: of the collectives of groups that a dispatcher makes.
        node: name of this rank's node.
        wide: sum results over ranks in float32, whatever their type, as Megatron-Core does.
        shared: objects that all layers share, such as process groups that a dispatcher makes, by keys of its choice.
    """

    group: dist.ProcessGroup
    ep: int
    etp: int
    device: torch.device
    timeout: timedelta
    node: str
    wide: bool = False
    shared: dict[Hashable, Any] = field(default_factory=dict)
