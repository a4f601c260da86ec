"""What training steps count, in worker processes; importable by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import connected, forget, join, start

from moesys.config import Config


def counted(cases: Mapping[str, Config], world: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each case's first step: its record, the load and, of each rank, what gates and the recorder counted."""
    start(_work, world, dict(cases), folder)
    return torch.load(folder / "counts.pt")


def _work(rank: int, world: int, cases: dict[str, Config], folder: Path) -> None:
    join(rank, world, folder)
    found = {}
    for name, config in cases.items():
        found[name] = _observe(config)
        if config.engine == "native":  # Megatron forgets its own groups
            forget()
    if rank == 0:
        torch.save(found, folder / "counts.pt")
    dist.barrier()
    dist.destroy_process_group()


def _observe(config: Config) -> dict[str, Any]:
    from moesys.data.corpus import open_corpus
    from moesys.moe.record import Recorder
    from moesys.train.loop import Trainer

    config, mesh = connected(config)
    trainer = Trainer(config, mesh, open_corpus(config))
    gates: dict[str, float] = {}

    def look() -> None:
        layers = trainer.engine.moe_layers().items()
        gates.update({n: float(layer.gate.load.sum()) for n, layer in layers if layer.gate.load is not None})

    trainer.before_update = look
    recorder = Recorder(trainer.engine.moe_layers())
    record = trainer.train_step()
    recorded = {n: r.expert_TK.ge(0).sum().item() for n, r in recorder.take().items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (gates, recorded))
    return {"record": record, "load": trainer.load, "ranks": everyone}
