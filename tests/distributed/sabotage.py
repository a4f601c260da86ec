"""What tests do inside worker processes, importable by name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from moesys.errors import DataError

BUCKET_BYTES = 16 * 2**10
"""Of small buckets."""


def forget_the_experts() -> None:
    """Break one rule: leave the gradients of experts unreduced over their data ranks."""
    from moesys.parallel.gradients import Gradients

    Gradients._experts = lambda self, ids: []  # type: ignore[method-assign]


def forbid_outputs_of_a_pipeline() -> None:
    """Let a pipeline fail that puts the logits of all micro-batches together."""
    from torch.distributed.pipelining import schedules

    def merge(self: Any, chunks: list[Any]) -> Any:
        raise AssertionError(f"{len(chunks)} micro-batches' outputs are kept and put together, and nobody needs them")

    for owner in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
        owner._merge_outputs = merge  # type: ignore[method-assign]


def gather_and_wait_too_often() -> None:
    """Let each block's first norm be a unit of FSDP, and the host ask the device for each gate's largest logit."""
    from torch.distributed.fsdp import fully_shard

    from moesys.moe.gates.top_k import GateProjection
    from moesys.parallel import data

    plain, forward = data.apply, GateProjection.forward

    def apply(model: Any, mesh: Any, config: Any) -> Any:
        for block in model.layers.values():
            fully_shard(block.get_submodule("attention_norm"), mesh=mesh.data((), ("dp_shard", "cp")))
        return plain(model, mesh, config)

    def ask(self: GateProjection, x: Any) -> Any:
        logits = forward(self, x)
        logits.max().item()
        return logits

    data.apply, GateProjection.forward = apply, ask  # type: ignore[assignment,method-assign]


def in_small_buckets() -> None:
    """Break no rule: let the gradients of small models fill many buckets, so that their order is that of large ones."""
    from moesys.parallel import buckets

    buckets.BUCKET_BYTES = BUCKET_BYTES


def send_everything_to_the_first_expert() -> None:
    """All tokens choose expert 0, whatever the weights."""
    in_small_buckets()
    import torch
    from torch.distributed.tensor import DTensor, Replicate

    from moesys.moe.gates.top_k import GateProjection

    plain = GateProjection.forward

    def forward(self: GateProjection, x: torch.Tensor) -> torch.Tensor:
        logits = plain(self, x)
        push = 100.0 * torch.nn.functional.one_hot(torch.tensor(0), logits.shape[-1])
        if isinstance(logits, DTensor):
            push = DTensor.from_local(push, logits.device_mesh, [Replicate()], run_check=False)
        return logits + push

    GateProjection.forward = forward  # type: ignore[method-assign]


def stall_the_second_rank() -> None:
    """Let rank 1 hang instead of training."""
    from time import sleep

    import torch.distributed as dist

    from moesys.train.loop import Trainer

    plain = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, Any]:
        if dist.get_rank() == 1:
            sleep(600)
        return plain(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def report_layout(config: Any, world: int, folder: Path) -> dict[int, tuple[int, dict[str, int]]]:
    """Per rank of one real training step: elements of parameters held, bytes of rows by operation and level."""
    import torch.multiprocessing as mp

    mp.start_processes(_report, (world, config, str(folder)), nprocs=world, start_method="forkserver")
    return {rank: tuple(json.loads((folder / f"layout-{rank}.json").read_text())) for rank in range(world)}


def _report(rank: int, world: int, config: Any, folder: str) -> None:
    import torch.distributed as dist

    from moesys.data.corpus import open_corpus
    from moesys.parallel.gradients import local
    from moesys.train.loop import Trainer
    from moesys.train.native import connect

    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    trainer = Trainer(config, connect(config), open_corpus(config))
    trainer.train_step()
    sent: dict[str, int] = {}
    for event in trainer.events:
        if event.level and event.kind in ("all_to_all", "all_gather", "reduce_scatter"):
            key = f"{event.kind} {event.level}"
            sent[key] = sent.get(key, 0) + event.bytes
    elements = sum(local(p).numel() for p in trainer.engine.model.named_parameters().values())
    Path(f"{folder}/layout-{rank}.json").write_text(json.dumps([elements, sent]))
    dist.barrier()
    dist.destroy_process_group()


def failing(rank: int, world: int, how: str, folder: str) -> None:
    """End as `how` says, rank 1 first."""
    if rank == 0:
        signal.pause()
    if how == "user":
        raise DataError("there is no text")
    if how == "bug":
        raise KeyError("x")
    os.kill(os.getpid(), signal.SIGKILL)
