"""Training steps of the Megatron engine in worker processes; importable by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import connected, join, merged, start

from moesys.config import Config
from moesys.train import verify

Cases = Mapping[str, tuple[Config, int]]
"""Configurations and numbers of steps."""

Journeys = Mapping[str, Sequence[Config]]
"""Configurations of a run, one after another: each continues from the checkpoint of the one before."""


def observed(cases: Cases, journeys: Journeys, steps: int, world: int, folder: Path) -> Any:
    """On `world` processes, all after one another in the same ones: what each case computes; of each journey
    (loss, norm) of every step, `steps` for each configuration; and elements of weights that the first rank of each
    pipeline stage holds, by case."""
    start(_work, world, cases, journeys, steps, folder)
    found = {name: merged(sorted(folder.glob(f"trace-{number}-*.pt"))) for number, name in enumerate(cases)}
    held = {
        name: [torch.load(path) for path in sorted(folder.glob(f"held-{number}-*.pt"))]
        for number, name in enumerate(cases)
    }
    return found, torch.load(folder / "journeys.pt"), held


def _work(rank: int, world: int, cases: Cases, journeys: Journeys, steps: int, folder: Path) -> None:
    join(rank, world, folder)
    for number, (config, count) in enumerate(cases.values()):
        _observe(config, count, folder, number)
    gone = {
        name: [figures for config in configs for figures in _continued(config, steps, folder / name)]
        for name, configs in journeys.items()
    }
    if rank == 0:
        torch.save(gone, folder / "journeys.pt")
    dist.barrier()
    dist.destroy_process_group()


def _observe(config: Config, steps: int, folder: Path, number: int) -> None:
    config, mesh = connected(config)
    found, trainer = verify.observe(config, mesh, steps, torch.float32)
    if not any(place for axis, place in mesh.place.items() if axis != "pp"):
        torch.save(found, folder / f"trace-{number}-{mesh.rank}.pt")
        parts = getattr(trainer.engine, "parts", [])
        torch.save(
            sum(p.numel() for part in parts for p in part.parameters()), folder / f"held-{number}-{mesh.rank}.pt"
        )


def _continued(config: Config, steps: int, folder: Path) -> list[tuple[float, float]]:
    """(loss, norm) of the next steps of the run whose checkpoints are in `folder`."""
    from moesys.data.corpus import open_corpus
    from moesys.train.loop import Trainer

    config, mesh = connected(config)
    trainer = Trainer(config, mesh, open_corpus(config))
    trainer.resume(folder)
    records = [trainer.train_step() for _ in range(steps)]
    trainer.save(folder)
    return [(record["loss"], record["grad_norm"]) for record in records]
