"""`engine: megatron`: a run trained by Megatron-Core, behind `moesys.train.engine.Engine`.

The MoE layer is this project's, by the same definitions as in the native engine, and weights have the same initial
values: so both engines train the same model. Without a GPU everything runs on gloo, inside `stand_ins`.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from moesys.config.schema import Config
from moesys.megatron.cpu import stand_ins
from moesys.megatron.mesh import MegatronRanks
from moesys.megatron.quiet import quiet
from moesys.parallel.mesh import Ranks
from moesys.train.native import joined

if TYPE_CHECKING:
    from moesys.megatron.training import MegatronEngine

_process = ExitStack()
"""What holds for the rest of the process."""


def connect(config: Config) -> MegatronRanks:
    """Join the process group and make Megatron's groups."""
    degrees, device = joined(config)
    if device.type == "cpu":
        # Compiling Megatron's small fused functions takes longer than they ever save here.
        torch.compiler.set_stance("force_eager")
    _process.enter_context(stand_ins())
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with quiet():
        return MegatronRanks(config, degrees, device)


def build(config: Config, mesh: Ranks, vocab_size: int, dtype: torch.dtype | None = None) -> MegatronEngine:
    """The engine on this rank; `dtype` must be None or float32."""
    with quiet():
        from moesys.megatron.training import MegatronEngine
    assert isinstance(mesh, MegatronRanks)
    assert dtype in (None, torch.float32)
    return MegatronEngine(config, mesh, vocab_size)
