"""What training steps count, and what evaluation finds, in worker processes; importable by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import connected, forget, join, start

from moesys.config import Config


def counted(cases: Mapping[str, Config], world: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each case's first step: its record, the load and, of each rank, what gates and the recorder counted."""
    start(_work, world, dict(cases), _observe, folder)
    return torch.load(folder / "found.pt")


def evaluated(cases: Mapping[str, Config], world: int, folder: Path) -> dict[str, float]:
    """The held-out loss of each case before its first step."""
    start(_work, world, dict(cases), _evaluate, folder)
    return torch.load(folder / "found.pt")


def exact(cases: Mapping[str, Config], folder: Path) -> dict[str, float]:
    """The same in one process whose micro-batches have the held-out sequences alone."""
    start(_work, 1, dict(cases), _exact, folder)
    return torch.load(folder / "found.pt")


def _work(rank: int, world: int, cases: dict[str, Config], work: Callable[[Config], Any], folder: Path) -> None:
    join(rank, world, folder)
    found = {}
    for name, config in cases.items():
        found[name] = work(config)
        if config.engine == "native":  # Megatron forgets its own groups
            forget()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def _observe(config: Config) -> dict[str, Any]:
    from moesys.data.corpus import open_corpus
    from moesys.moe.record import RoutingRecorder
    from moesys.train.loop import Trainer

    config, mesh = connected(config)
    trainer = Trainer(config, mesh, open_corpus(config))
    gates: dict[str, float] = {}

    def look() -> None:
        layers = trainer.engine.moe_layers().items()
        gates.update({n: float(layer.gate.load.sum()) for n, layer in layers if layer.gate.load is not None})

    trainer.before_update = look
    recorder = RoutingRecorder(trainer.engine.moe_layers())
    record = trainer.train_step()
    recorded = {n: r.expert_TK.ge(0).sum().item() for n, r in recorder.take().items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (gates, recorded))
    return {"record": record, "load": trainer.load, "ranks": everyone}


def _trainer(config: Config) -> Any:
    from moesys.data.corpus import open_corpus
    from moesys.train.loop import Trainer

    config, mesh = connected(config)
    return Trainer(config, mesh, open_corpus(config))


def _evaluate(config: Config) -> float:
    return _trainer(config).evaluate()


@torch.no_grad()
def _exact(config: Config) -> float:
    trainer, size = _trainer(config), config.train.micro_batch
    (model,) = trainer.engine.model.parts
    windows = torch.stack([torch.from_numpy(trainer.heldout[n]) for n in range(trainer.heldout_windows())])
    total = 0.0
    for ids in windows.split(size):
        tokens, labels = ids[:, :-1], ids[:, 1:]
        logits = model.eval()(tokens, torch.stack((torch.arange(tokens.numel()).view_as(tokens), tokens), -1))
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()
