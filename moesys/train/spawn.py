"""Spawns worker processes on this machine for proofs and benchmarks."""

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
from moesys.errors import LaunchError
from moesys.loopback import stay_here
from moesys.parallel.mesh import Ranks
from moesys.parallel.rendezvous import enter
from moesys.train import device, machine
from moesys.train.failure import Failure


def resolve_device(config: Config, world: int, what: str) -> Config:
    """The configuration for `what` ("verify") in at most `world` processes here, with `cluster.device` decided.

    Prints a note if GPUs stay unused. Raises `LaunchError` if this machine cannot run the processes.
    """
    config, word = device.placed(config, world)
    if word:
        print(f"{what}: {word}", flush=True)
    machine.demand(config, world, what)
    return config


@contextmanager
def processes(work: Callable[..., None], world: int, *arguments: Any) -> Iterator[Path]:
    """Run `work(rank, world, *arguments, folder)`, importable by name, in `world` processes to its end.

    Yields the folder, to which `work` may write results; it is removed afterwards.

    Raises:
        LaunchError: a process failed; says why, with a traceback where the error was not meant for users.
    """
    stay_here()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["moesys.train.loop", "moesys.train.worker"])
    with leftovers.temporary("proof") as folder:
        try:
            words = (world, *arguments, str(folder))
            mp.start_processes(_run, (work, *words), nprocs=world, start_method="forkserver")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise _cause(error, folder) from None
        yield folder


def _run(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    """Do the work of one process, and write its failure to the folder."""
    folder = Path(arguments[-1])
    try:
        work(rank, *arguments)
    except BaseException as error:
        (folder / f"failure-{rank}.json").write_text(Failure.of(error, rank, folder).json)
        raise


def _cause(error: mp.ProcessRaisedException | mp.ProcessExitedException, folder: Path) -> LaunchError:
    """The failure that caused the others, as an error for the user."""
    if isinstance(error, mp.ProcessExitedException):
        how = f"was killed by {error.signal_name}" if error.signal_name else f"exited with code {error.exit_code}"
        return LaunchError(f"process {error.error_index} {how}")
    failures = [Failure.parse(path.read_text()) for path in folder.glob("failure-*.json")]
    if not failures:
        return LaunchError(str(error))
    cause = min(failures, key=lambda failure: failure.order)
    found = LaunchError(f"process {cause.rank} failed: {cause.text}")
    found.exit_code = cause.exit_code
    return found


@contextmanager
def process_group(rank: int, world: int, config: Config, folder: str) -> Iterator[Ranks]:
    """Join the process group of `processes` through a file in `folder`; yields the meshes.

    `config`: as `resolve_device` returned it.
    """
    from moesys.train.engine import engine_of

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    os.environ["LOCAL_RANK"] = str(rank)
    kind = "cuda" if config.cluster.device == "cuda" else "cpu"
    os.environ.update(device.hide_gpus(kind))
    timeout = timedelta(seconds=config.launch.timeout_s)
    store = dist.FileStore(f"{folder}/rendezvous", world)
    enter(kind, store, rank, world, timeout)
    yield engine_of(config).connect(config)
    dist.barrier()
    dist.destroy_process_group()
