"""The process groups of a run: two meshes over the same ranks, and axes flattened from them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend "fake")

from moesys.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees
from moesys.parallel.timeout import set_timeout


class Ranks:
    """The place of this rank on both meshes of `degrees`."""

    def __init__(self, degrees: Degrees, device: torch.device):
        self.degrees, self.device = degrees, device
        self.rank = dist.get_rank()
        self.place = degrees.coordinates(self.rank, DENSE_AXES)
        self.expert_place = degrees.coordinates(self.rank, EXPERT_AXES)

    def active(self, *axes: str) -> tuple[str, ...]:
        """The axes among `axes` with more than one rank."""
        return tuple(axis for axis in axes if getattr(self.degrees, axis) > 1)

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The group of this rank along `axes`; None if it is alone."""
        raise NotImplementedError

    def groups(self) -> list[tuple[tuple[str, ...], dist.ProcessGroup]]:
        """Every group of this rank with more than one rank, and its axes."""
        raise NotImplementedError


class ParallelMesh(Ranks):
    """Both meshes of `degrees`; all their groups are connected when this returns.

    Collective over the world. `timeout_s` holds for all groups: the group of an axis does not inherit the default
    group's timeout (Megatron-LM #2238), and a group that connects on first use fails late.
    """

    def __init__(self, degrees: Degrees, device: torch.device, timeout_s: float):
        super().__init__(degrees, device)
        self._meshes = {axes: self._build(axes, device.type) for axes in (DENSE_AXES, EXPERT_AXES)}
        self._flat: dict[tuple[str, ...], DeviceMesh] = {}
        for axes in (
            ("dp_replicate", "dp_shard", "cp"),
            ("dp_replicate", "dp_shard"),
            ("dp_shard", "cp"),
            ("cp", "tp"),
            ("edp_replicate", "edp_shard"),
            ("ep", "etp"),
        ):
            self.flat(*axes)
        self._connect(timedelta(seconds=timeout_s))

    def _build(self, axes: tuple[str, ...], device_type: str) -> DeviceMesh:
        sizes = self.degrees.sizes(axes)
        # An axis of size 1 never communicates: it needs no real group.
        fake: dict[Any, Any] = {axis: "fake" for axis, size in zip(axes, sizes, strict=True) if size == 1}
        return init_device_mesh(device_type, sizes, mesh_dim_names=axes, backend_override=fake)

    def _root(self, axes: tuple[str, ...]) -> DeviceMesh:
        return self._meshes[DENSE_AXES if set(axes) <= set(DENSE_AXES) else EXPERT_AXES]

    def size(self, *axes: str) -> int:
        """The number of ranks of the group along `axes`."""
        size = 1
        for axis in axes:
            size *= getattr(self.degrees, axis)
        return size

    def mesh(self, *axes: str) -> DeviceMesh | None:
        """The mesh of the active ones of `axes`, in their order; None if there is none."""
        active = self.active(*axes)
        return self._root(active)[active if len(active) > 1 else active[0]] if active else None

    def flat(self, *axes: str) -> DeviceMesh | None:
        """One axis made of `axes`, which are neighbours in their mesh; None if its size is 1."""
        active = self.active(*axes)
        if not active:
            return None
        if active not in self._flat:
            root = self._root(active)
            self._flat[active] = root[active]._flatten("_".join(active)) if len(active) > 1 else root[active[0]]
        return self._flat[active]

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        flat = self.flat(*axes)
        return None if flat is None else flat.get_group()

    def groups(self) -> list[tuple[tuple[str, ...], dist.ProcessGroup]]:
        single = [(axis,) for axes in self._meshes for axis in self.active(*axes)]
        found = {axes: self._root(axes)[axes[0]].get_group() for axes in single}
        return list((found | {axes: mesh.get_group() for axes, mesh in self._flat.items()}).items())

    def data(self, replicate: tuple[str, ...], shard: tuple[str, ...]) -> DeviceMesh | None:
        """The mesh for FSDP2: (shard), or (replicate, shard) for hybrid sharding."""
        inner, outer = self.flat(*shard), self.flat(*replicate)
        if inner is None or outer is None:
            return inner
        return DeviceMesh._concatenate([outer, inner])

    def _connect(self, timeout: timedelta) -> None:
        groups = {group.group_name: group for _, group in self.groups()}
        for name in sorted(groups):
            dist.all_reduce(torch.zeros(1, device=self.device), group=groups[name])
            set_timeout(timeout, groups[name])
        set_timeout(timeout, dist.group.WORLD)
