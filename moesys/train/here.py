"""Worker processes on this machine for what is no run: proofs and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moesys import leftovers
from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.loopback import stay_here
from moesys.parallel.mesh import Ranks


@contextmanager
def started(work: Callable[..., None], world: int, *arguments: Any) -> Iterator[Path]:
    """Run `work(rank, world, *arguments, folder)`, importable by name, in `world` processes to its end.

    Yields the folder, in which results may be left; it is removed afterwards.

    Raises:
        MoesysError: what a process raised that a user is to read.
    """
    stay_here()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["moesys.train.loop", "moesys.train.worker"])
    with leftovers.temporary("proof") as folder:
        try:
            words = (world, *arguments, str(folder))
            mp.start_processes(_call, (work, *words), nprocs=world, start_method="forkserver")
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            if text := next((path.read_text() for path in sorted(folder.glob("told-*.txt"))), ""):
                raise MoesysError(text) from None
            raise
        yield folder


def _call(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(rank, *arguments)`, whose last argument is the folder; leaves there what a user is to read."""
    try:
        work(rank, *arguments)
    except MoesysError as error:
        Path(arguments[-1], f"told-{rank}.txt").write_text(str(error))
        raise


@contextmanager
def joined(rank: int, world: int, config: Config, folder: str) -> Iterator[Ranks]:
    """In such a process: its meshes, connected through a file in `folder`."""
    from moesys.train.engine import engine_of

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "nccl" if config.cluster.device == "cuda" else "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=config.launch.timeout_s),
    )
    yield engine_of(config).connect(config)
    dist.barrier()
    dist.destroy_process_group()
