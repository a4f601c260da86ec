"""Many small runs in few sets of processes: starting processes costs more than such a run."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ran import Ran, observe
from torch.distributed.tensor import debug

from moesys.config import Config
from moesys.train import verify

CLEAR = ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache", "_clear_python_sharding_prop_cache")

Prepare = Callable[[], None] | None


def traces(
    runs: Mapping[str, tuple[Config, int]],
    steps: int,
    folder: Path,
    prepare: Prepare = None,
    ran: dict[str, Ran] | None = None,
) -> dict[str, verify.Trace]:
    """What each run computes on so many processes in float32, as `verify.trace` finds it.

    One set of processes for each number of them, in which runs follow one another. `prepare` as there. `ran` gets
    what a further step of each run of several processes does.
    """
    found = {}
    for world in sorted({world for _, world in runs.values()}):
        mine = {name: config for name, (config, ranks) in runs.items() if ranks == world}
        place = folder / str(world)
        place.mkdir(parents=True)
        start(_work, world, mine, steps, place, prepare, ran is not None)
        for number, name in enumerate(mine):
            found[name] = merged(sorted(place.glob(f"trace-{number}-*.pt")))
            if ran is not None and world > 1:
                ran[name] = Ran(**json.loads((place / f"ran-{number}.json").read_text()))
    return found


def start(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run `work(rank, world, *arguments)` in `world` processes to its end."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["moesys.train.loop", "moesys.train.worker"])
    mp.start_processes(work, (world, *arguments), nprocs=world, start_method="forkserver")


def merged(paths: list[Path]) -> verify.Trace:
    """The traces of pipeline stages as one."""
    whole = verify.Trace()
    for path in paths:
        verify._merge(whole, torch.load(path, weights_only=False))
    return whole


def _work(
    rank: int, world: int, configs: dict[str, Config], steps: int, folder: Path, prepare: Prepare, further: bool
) -> None:
    if prepare is not None:
        prepare()
    join(rank, world, folder)
    for number, config in enumerate(configs.values()):
        observed(config, steps, folder, number, further)
    dist.barrier()
    dist.destroy_process_group()


def join(rank: int, world: int, folder: Path) -> None:
    """Make this process a rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)


def observed(config: Config, steps: int, folder: Path, number: int, further: bool = False) -> None:
    """One run; the first rank of each pipeline stage writes its trace. Ends all groups but the world's.

    `further`: one more step, of which rank 0 writes what was done in it.
    """
    config, mesh = connected(config)
    found, trainer = verify.observe(config, mesh, steps, torch.float32)
    if not any(place for axis, place in mesh.place.items() if axis != "pp"):
        torch.save(found, folder / f"trace-{number}-{mesh.rank}.pt")
    if further and mesh.degrees.world > 1:
        trainer.before_update = None  # it gathers gradients
        ran = observe(trainer)
        if ran is not None:
            (folder / f"ran-{number}.json").write_text(json.dumps(asdict(ran)))
    del mesh, trainer
    forget()


def connected(config: Config) -> tuple[Config, Any]:
    """The run as it is compared, and its meshes."""
    from moesys.train.engine import engine_of

    config = verify.comparable(config)
    mesh = engine_of(config).connect(config)
    gc.freeze()  # what a run leaves is to be collected, not looked for among all that was imported
    return config, mesh


def forget() -> None:
    """End all groups but the world's: each of gloo's keeps threads awake."""
    for clear in CLEAR:
        getattr(debug, clear, lambda: None)()  # what DTensor remembers names groups
    gc.collect()  # models hold groups, and themselves
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
