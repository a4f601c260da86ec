"""What the ranks of `test_planned` do: a module that their processes can import."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from batches import forget, join
from ran import observe

from moesys.config import Config


def observed(rank: int, world: int, configs: dict[str, Config], folder: Path) -> None:
    """Write what one step of each configuration does; those of one layout, one after another, share groups."""
    from moesys.data.corpus import open_corpus
    from moesys.train.engine import engine_of
    from moesys.train.loop import Trainer

    join(rank, world, folder)
    mesh, before = None, ""
    for name, config in configs.items():
        layout = config.parallel.model_dump_json()
        if mesh is None or layout != before:
            mesh = None
            forget()
            mesh, before = engine_of(config).connect(config), layout
        trainer = Trainer(config, mesh, open_corpus(config))
        if mesh.degrees.pp > 1:
            trainer.train_step()  # in the first one, stages agree on shapes
        ran = observe(trainer)
        if ran is not None:
            (folder / f"{name}.json").write_text(json.dumps(asdict(ran)))
        del trainer
    dist.barrier()
    dist.destroy_process_group()
