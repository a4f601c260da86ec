"""`engine: megatron`: a run trained by Megatron-Core, behind `moesys.train.engine.Engine`.

The MoE layer is this project's, by the same definitions as in the native engine, and weights have the same initial
values: so both engines train the same model. Without a GPU everything runs on gloo, inside `cpu_substitutes`.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

import torch

from moesys.config.schema import Config
from moesys.megatron.cpu import cpu_substitutes
from moesys.megatron.mesh import MegatronRanks
from moesys.megatron.quiet import quiet
from moesys.parallel.mesh import Ranks
from moesys.train.native import join_process_group

if TYPE_CHECKING:
    from moesys.megatron.training import MegatronEngine


def connect(config: Config) -> MegatronRanks:
    """Join the process group and make Megatron's groups."""
    degrees, device = join_process_group(config)
    _prepare(device.type)
    with quiet():
        ranks = MegatronRanks(config, degrees, device)
        if device.type == "cuda":
            from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

            model_parallel_cuda_manual_seed(config.seed)
    return ranks


@cache
def _prepare(device: str) -> ExitStack:
    """Set up this process for Megatron-Core, once."""
    kept = ExitStack()
    kept.enter_context(cpu_substitutes(device))
    if device == "cpu":
        # Compiling Megatron's small fused functions on CPU takes longer than they save.
        torch.compiler.set_stance("force_eager")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # Megatron calls collectives by names that torch 2.13 has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", module="megatron")
    return kept


def build(
    config: Config, mesh: Ranks, vocab_size: int, dtype: torch.dtype | None = None, draw: bool = True
) -> MegatronEngine:
    """The engine on this rank; `dtype` must be None or float32; `draw`: see `EngineModule`."""
    with quiet():
        from moesys.megatron.training import MegatronEngine
    assert isinstance(mesh, MegatronRanks)
    assert dtype in (None, torch.float32)
    return MegatronEngine(config, mesh, vocab_size, draw=draw)
