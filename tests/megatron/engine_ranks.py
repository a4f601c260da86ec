"""Training steps of the Megatron engine in worker processes; importable by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Journeys = Mapping[str, Sequence[Any]]
"""Configurations of a run, one after another: each continues from the checkpoint of the one before."""


def observed(cases: Mapping[str, tuple[Any, int]], journeys: Journeys, steps: int, world: int, folder: Path) -> Any:
    """On `world` processes, all after one another in the same ones: what each (configuration, steps) computes; of
    each journey (loss, norm) of every step, `steps` for each configuration; and elements of weights that the first
    rank of each pipeline stage holds, by case."""
    import torch
    import torch.multiprocessing as mp

    from moesys.train.verify import Trace, _merge

    mp.start_processes(_work, (world, cases, journeys, steps, str(folder)), nprocs=world, start_method="forkserver")
    found, held = {}, {}
    for number, name in enumerate(cases):
        found[name], held[name] = Trace(), []
        for path in sorted(folder.glob(f"trace-{number}-*.pt")):
            part, elements = torch.load(path, weights_only=False)
            _merge(found[name], part)
            held[name].append(elements)
    return found, torch.load(folder / "journeys.pt"), held


def _work(
    rank: int, world: int, cases: Mapping[str, tuple[Any, int]], journeys: Journeys, steps: int, folder: str
) -> None:
    import torch
    import torch.distributed as dist

    from moesys.train.verify import observe

    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for number, (config, count) in enumerate(cases.values()):
        config, mesh = _connected(config)
        found, trainer = observe(config, mesh, count, torch.float32)
        if not any(place for axis, place in mesh.place.items() if axis != "pp"):
            parts = getattr(trainer.engine, "parts", [])
            elements = sum(p.numel() for part in parts for p in part.parameters())
            torch.save((found, elements), f"{folder}/trace-{number}-{rank}.pt")
        del trainer  # and with it the process groups that it holds
    gone = {
        name: [figures for config in configs for figures in _continued(config, steps, Path(folder) / name)]
        for name, configs in journeys.items()
    }
    if rank == 0:
        torch.save(gone, f"{folder}/journeys.pt")
    dist.barrier()
    dist.destroy_process_group()


def _connected(config: Any) -> tuple[Any, Any]:
    import gc

    from moesys.train.engine import engine_of
    from moesys.train.verify import comparable

    config = comparable(config)
    mesh = engine_of(config).connect(config)
    gc.freeze()  # each case collects what the one before left: not among all that was imported
    return config, mesh


def _continued(config: Any, steps: int, folder: Path) -> list[tuple[float, float]]:
    """(loss, norm) of the next steps of the run whose checkpoints are in `folder`."""
    from moesys.data.corpus import open_corpus
    from moesys.train.loop import Trainer

    config, mesh = _connected(config)
    trainer = Trainer(config, mesh, open_corpus(config))
    trainer.resume(folder)
    records = [trainer.train_step() for _ in range(steps)]
    trainer.save(folder)
    return [(record["loss"], record["grad_norm"]) for record in records]
