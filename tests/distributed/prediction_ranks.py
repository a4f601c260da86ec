"""What `test_prediction` runs in a process of its own: a module that it can import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from batches import join

from moesys.config import Config


def trained(rank: int, world: int, config: Config, folder: Path) -> None:
    """Write one step of training in float64, and evaluation before it: windows, weights, gradients and records."""
    from moesys.data.corpus import open_corpus
    from moesys.train.engine import engine_of
    from moesys.train.loop import Trainer

    join(rank, world, folder)
    trainer = Trainer(config, engine_of(config).connect(config), open_corpus(config), torch.float64)
    windows = torch.stack([torch.from_numpy(trainer.samples[n]) for n in range(config.train.global_batch)])
    heldout = torch.stack([torch.from_numpy(trainer.heldout[n]) for n in range(trainer.heldout_windows())])
    found = {"windows": windows, "heldout": heldout, "weights": trainer.engine.weights()}
    found["evaluation"] = trainer.evaluate()
    trainer.before_update = lambda: found.update(gradients=trainer.engine.gradients())
    found["record"] = trainer.train_step()
    torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
