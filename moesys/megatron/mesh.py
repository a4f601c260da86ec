"""Megatron-Core's process groups as the ranks of a run: its order of dimensions is this project's."""

from __future__ import annotations

import gc
from datetime import timedelta

import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import Ranks
from moesys.parallel.timeout import set_timeout

ORDER = "tp-cp-ep-dp-pp"
"""Megatron's order, fastest first: that of `DENSE_AXES` and `EXPERT_AXES`, reversed."""


class MegatronRanks(Ranks):
    """The groups that `parallel_state` makes for `degrees`, in place of any before. Collective over the world."""

    def __init__(self, config: Config, degrees: Degrees, device: torch.device):
        from megatron.core import parallel_state as state

        super().__init__(degrees, device)
        p = config.parallel
        forget()
        state.initialize_model_parallel(
            tensor_model_parallel_size=degrees.tp,
            pipeline_model_parallel_size=degrees.pp,
            virtual_pipeline_model_parallel_size=p.pp_virtual if p.pp_virtual > 1 else None,
            expert_model_parallel_size=degrees.ep,
            expert_tensor_parallel_size=degrees.etp,
            order=ORDER,
            create_gloo_process_groups=False,
        )
        for group in state._global_process_group_list or ():
            set_timeout(timedelta(seconds=config.launch.timeout_s), group or dist.group.WORLD)
        found = (
            (("pp",), state.get_pipeline_model_parallel_group()),
            (("pp",), state.get_embedding_group(check_initialized=False)),
            (("tp",), state.get_tensor_model_parallel_group()),
            (("dp_replicate", "dp_shard"), state.get_data_parallel_group()),
            (("dp_replicate", "dp_shard"), state.get_data_parallel_group(with_context_parallel=True)),
            (("edp_replicate", "edp_shard"), state.get_expert_data_parallel_group()),
            (("ep", "etp"), state.get_expert_tensor_and_model_parallel_group()),
            (("etp",), state.get_expert_tensor_parallel_group()),
            (("ep",), state.get_expert_model_parallel_group()),
        )
        # Not every rank holds an embedding.
        known = [(axes, group) for axes, group in found if isinstance(group, dist.ProcessGroup)]
        self._groups = [(active, group) for axes, group in known if (active := self.active(*axes))]

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Megatron's group over `axes`; None if it has one rank alone."""
        active = self.active(*axes)
        return next((group for known, group in self._groups if known == active), None) if active else None

    def groups(self) -> list[tuple[tuple[str, ...], dist.ProcessGroup]]:
        """All of Megatron's groups that this rank is in, with their axes."""
        return self._groups


def forget() -> None:
    """Destroy Megatron's groups, if there are any: each gloo group keeps threads awake. Collective over the world."""
    from megatron.core import parallel_state as state

    if not state.model_parallel_is_initialized():
        return
    gc.collect()  # models hold groups, in reference cycles
    dist.barrier()
    for group in state._global_process_group_list or ():
        if group is not None:  # None is the world
            dist.destroy_process_group(group)
    state.destroy_model_parallel()
