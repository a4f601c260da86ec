"""Many small runs in one set of processes: starting processes costs more than such a run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ran import Ran, observe

from moesys.config import Config
from moesys.train import verify


def traces(
    configs: dict[str, Config], world: int, steps: int, folder: Path, ran: dict[str, Ran] | None = None
) -> dict[str, verify.Trace]:
    """What each run computes in float64 on `world` processes; `ran` gets what a further step of each does.

    None has pipeline stages; those of one layout share its groups.
    """
    folder.mkdir(exist_ok=True)
    comparable = {name: verify.comparable(config) for name, config in configs.items()}
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["moesys.train.loop", "moesys.train.worker"])
    mp.start_processes(_work, (world, comparable, steps, folder), nprocs=world, start_method="forkserver")
    if ran is not None:
        ran |= torch.load(folder / "ran.pt", weights_only=False)
    return torch.load(folder / "traces.pt", weights_only=False)


def _work(rank: int, world: int, configs: dict[str, Config], steps: int, folder: Path) -> None:
    from moesys.parallel.mesh import ParallelMesh
    from moesys.train.native import connect

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    meshes: dict[str, ParallelMesh] = {}
    found, ran = {}, {}
    for name, config in configs.items():
        layout = str(config.parallel.model_dump(exclude={"dispatch"}))
        if layout not in meshes:
            meshes[layout] = connect(config)
        found[name], trainer = verify.observe(config, meshes[layout], steps, torch.float64)
        if world > 1:
            trainer.before_update = None  # it gathers gradients
            ran[name] = observe(trainer)
    if rank == 0:
        torch.save(ran, folder / "ran.pt")
        torch.save(found, folder / "traces.pt")
    dist.barrier()
    dist.destroy_process_group()
