"""What steps report, from real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def first_records(config: Any, world: int, folder: Path, steps: int = 2) -> list[dict[str, Any]]:
    """The records of the first training steps on `world` processes."""
    import torch.multiprocessing as mp

    folder.mkdir()
    mp.start_processes(_work, (world, config, str(folder), steps), nprocs=world, start_method="forkserver")
    return json.loads((folder / "records.json").read_text())


def _work(rank: int, world: int, config: Any, folder: str, steps: int) -> None:
    import torch.distributed as dist

    from moesys.data.corpus import open_corpus
    from moesys.train.loop import Trainer
    from moesys.train.native import connect

    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    trainer = Trainer(config, connect(config), open_corpus(config))
    records = [trainer.train_step() for _ in range(steps)]
    if rank == 0:
        Path(f"{folder}/records.json").write_text(json.dumps(records))
    dist.barrier()
    dist.destroy_process_group()
