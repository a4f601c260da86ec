"""Training steps of the Megatron engine in worker processes; importable by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import connected, join, merged, start
from ran import Ran, observe

from moesys.config import Config
from moesys.errors import CheckpointError
from moesys.train import verify

Cases = Mapping[str, tuple[Config, int]]
"""Configurations and numbers of steps."""

COUNTED = ("ep 2", "pp 2, ep 2", "tp 2, ep 2")
"""Cases whose collectives are counted."""

Journeys = Mapping[str, Sequence[Config]]
"""Configurations of a run, one after another: each continues from the checkpoint of the one before."""


def observed(cases: Cases, journeys: Journeys, steps: int, world: int, folder: Path) -> Any:
    """On `world` processes, all after one another in the same ones: what each case computes; of each journey
    (loss, norm) of every step, `steps` for each configuration; elements of weights that the first rank of each
    pipeline stage holds, by case; of each journey what every rank says, by engine, when its end is damaged; and what
    a further step of each case of `COUNTED` does."""
    start(_work, world, cases, journeys, steps, folder)
    found = {name: merged(sorted(folder.glob(f"trace-{number}-*.pt"))) for number, name in enumerate(cases)}
    held = {
        name: [torch.load(path) for path in sorted(folder.glob(f"held-{number}-*.pt"))]
        for number, name in enumerate(cases)
    }
    ran = {name: Ran(**json.loads((folder / f"ran-{name}.json").read_text())) for name in COUNTED if name in cases}
    return found, torch.load(folder / "journeys.pt"), held, torch.load(folder / "damaged.pt"), ran


def _work(rank: int, world: int, cases: Cases, journeys: Journeys, steps: int, folder: Path) -> None:
    join(rank, world, folder)
    for number, (name, (config, count)) in enumerate(cases.items()):
        _observe(config, count, folder, number, name if name in COUNTED else "")
    gone = {
        name: [figures for config in configs for figures in _continued(config, steps, folder / name)]
        for name, configs in journeys.items()
    }
    said = {name: _damaged(configs, folder / name) for name, configs in journeys.items()}
    if rank == 0:
        torch.save(gone, folder / "journeys.pt")
        torch.save(said, folder / "damaged.pt")
    dist.barrier()
    dist.destroy_process_group()


def _observe(config: Config, steps: int, folder: Path, number: int, counted: str) -> None:
    config, mesh = connected(config)
    found, trainer = verify.observe(config, mesh, steps, torch.float32)
    if not any(place for axis, place in mesh.place.items() if axis != "pp"):
        torch.save(found, folder / f"trace-{number}-{mesh.rank}.pt")
        parts = getattr(trainer.engine, "parts", [])
        torch.save(
            sum(p.numel() for part in parts for p in part.parameters()), folder / f"held-{number}-{mesh.rank}.pt"
        )
    if counted:
        trainer.before_update = None  # it gathers gradients
        ran = observe(trainer)
        if ran is not None:
            (folder / f"ran-{counted}.json").write_text(json.dumps(asdict(ran)))


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


def _damaged(configs: Sequence[Config], folder: Path) -> dict[str, list[Any]]:
    """What every rank says, by engine, when the newest checkpoint in `folder` has a changed bit."""
    from moesys.data.corpus import open_corpus
    from moesys.train.checkpoint import newest
    from moesys.train.loop import Trainer

    path = newest(folder)
    assert path is not None
    if dist.get_rank() == 0:
        file = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    said: dict[str, list[Any]] = {}
    for config in {config.engine: config for config in configs}.values():
        config, mesh = connected(config)
        said[config.engine] = [None] * dist.get_world_size()
        try:
            Trainer(config, mesh, open_corpus(config)).resume(folder)
            text = "accepted"
        except CheckpointError as error:
            text = str(error)
        dist.all_gather_object(said[config.engine], text)
    return said
