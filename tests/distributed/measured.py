"""Training steps recorded in worker processes, with delays made on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from time import sleep
from typing import Any

DELAY_S = 0.25
"""Far more than passes between a rank's gate and its dispatch. Medians over steps leave out a busy machine."""


def record(scenarios: Mapping[str, tuple[dict[str, Any], str]], world: int, folder: Path) -> None:
    """For each name of (configuration, what goes wrong): recorded steps in folder/name, as of a run."""
    import torch.multiprocessing as mp

    arrived = mp.get_context("forkserver").Semaphore(0)
    mp.start_processes(_record, (world, scenarios, str(folder), arrived), nprocs=world, start_method="forkserver")


def _record(
    rank: int, world: int, scenarios: Mapping[str, tuple[dict[str, Any], str]], folder: str, arrived: Semaphore
) -> None:
    import torch.distributed as dist

    from moesys.config.schema import Config
    from moesys.data.corpus import open_corpus
    from moesys.measure.record.recorder import StepRecorder
    from moesys.train.loop import Trainer
    from moesys.train.native import connect

    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for name, (raw, mishap) in scenarios.items():
        config = Config.model_validate(raw)
        trainer = Trainer(config, connect(config), open_corpus(config))
        MISHAPS[mishap](trainer, rank, arrived)
        recorder = StepRecorder(config, trainer.mesh, Path(folder) / name, 0)
        for number in range(1, config.train.steps + 1):
            with recorder.step(number) as recording:
                trainer.train_step()
            recorder.keep(recording, trainer.load)
        recorder.flush()
        dist.barrier()
    dist.destroy_process_group()


def _nothing(trainer: Any, rank: int, arrived: Semaphore) -> None:
    pass


def _late_before(layer: str) -> Callable[[Any, int, Semaphore], None]:
    """Behind the gate of `layer` rank 1 waits until rank 0 is there, however slow that is, and then `DELAY_S` more."""

    def delay(arrived: Semaphore) -> None:
        arrived.acquire()
        sleep(DELAY_S)

    def apply(trainer: Any, rank: int, arrived: Semaphore) -> None:
        for name, moe in trainer.engine.moe_layers().items():
            if name.startswith(layer):
                moe.gate.register_forward_hook(lambda *_: arrived.release() if rank == 0 else delay(arrived))

    return apply


MISHAPS = {"nothing": _nothing, "rank 1 late before layers.2": _late_before("layers.2.")}
