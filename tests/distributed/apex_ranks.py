"""Training with apex's FusedAdam, as its stand-in has it, in worker processes; importable by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import connected, forget, join, start

from moesys.config import Config

STAND_IN = Path(__file__).parent.parent / "stand_in"


def observed(journeys: Sequence[Sequence[Config]], steps: int, world: int, folder: Path) -> list[dict[str, Any]]:
    """Of each journey what the first rank has at its end: losses, weights, and the groups' step counts.

    A journey is a run whose configurations follow one another, `steps` steps each, through its checkpoints.
    """
    start(_work, world, journeys, steps, folder)
    return torch.load(folder / "found.pt", weights_only=False)


def _work(rank: int, world: int, journeys: Sequence[Sequence[Config]], steps: int, folder: Path) -> None:
    sys.path.insert(0, str(STAND_IN))
    join(rank, world, folder)
    found = [_gone(journey, steps, folder / str(number)) for number, journey in enumerate(journeys)]
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def _gone(journey: Sequence[Config], steps: int, folder: Path) -> dict[str, Any]:
    from moesys.data.corpus import open_corpus
    from moesys.train.loop import Trainer

    found: dict[str, Any] = {"losses": []}
    for config in journey:
        config, mesh = connected(config)
        trainer = Trainer(config, mesh, open_corpus(config))
        trainer.resume(folder)
        found["losses"] += [trainer.train_step()["loss"] for _ in range(steps)]
        trainer.save(folder)
        found["weights"] = trainer.engine.weights()
        apex = getattr(trainer.engine.optimizer, "_apex", None)
        found["counts"] = [group["step"] for group in apex.param_groups if group["params"]] if apex else []
        del trainer, mesh
        forget()
    return found
