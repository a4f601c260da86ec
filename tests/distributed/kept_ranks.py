"""What the ranks of `test_kept` do: a module that their processes can import."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from batches import forget, join
from kept import kept, kept_in_flight

from moesys.config import Config


def kept_of_each(rank: int, world: int, configs: dict[str, Config], folder: Path) -> None:
    """Write what each pipeline stage's first rank keeps of each configuration; those of one layout share groups."""
    from moesys.data.corpus import open_corpus
    from moesys.train.engine import engine_of
    from moesys.train.loop import Trainer

    join(rank, world, folder)
    found, mesh, before = {}, None, ""
    for name, config in configs.items():
        layout = config.parallel.model_dump_json()
        if mesh is None or layout != before:
            mesh = None
            forget()
            mesh, before = engine_of(config).connect(config), layout
        trainer = Trainer(config, mesh, open_corpus(config))
        sizes = (kept_in_flight if config.parallel.pp > 1 else kept)(trainer)
        if not any(place for axis, place in mesh.place.items() if axis != "pp"):
            found[name] = sizes
        del trainer
    (folder / f"kept-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
