"""Measures the cost of recording: training steps with and without it, interleaved in the same processes.

moesys bench measure configs/quickstart.yaml
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.files import write_json
from moesys.measure import simulated_recording
from moesys.measure.explain.averages import explain
from moesys.measure.explain.step_summary import Summary
from moesys.measure.interleaved_timing import alone, interleave, ratio
from moesys.measure.record.recorder import StepRecorder
from moesys.parallel import comm
from moesys.train import spawn
from moesys.train.guard import demand_numbers
from moesys.train.loop import Trainer
from moesys.words import plural


@dataclass(frozen=True)
class RecordingCost:
    """Medians over `rounds`, each of `steps` steps of each side.

    Attributes:
        seconds: of a step with collectives called bare.
        off: seconds of the same step as every run makes it, / bare.
        on: seconds with every `every`-th step recorded on all ranks, brought together and explained / off.
        all: seconds with every step recorded / off.
        noise: median of bare rounds / the bare rounds before: the variation of the machine.
    """

    seconds: float
    off: float
    on: float
    all: float
    every: int
    noise: float
    rounds: int
    steps: int
    world: int
    machine: str
    date: str

    def lines(self) -> list[str]:
        """The result as lines of text."""
        return [
            f"{self.machine}, {self.date}, {plural(self.world, 'rank')}",
            f"  medians of {plural(self.rounds, 'interleaved round')} of {plural(self.steps, 'step')} "
            f"of {self.seconds * 1e3:.1f} ms",
            f"  recording off / collectives called bare  {self.off:.4f}",
            f"  {f'step {self.every}, {2 * self.every}, … recorded / off':<40} {self.on:.4f}",
            f"  every step recorded / off                {self.all:.4f}",
            f"  bare / bare, one round after the other   {self.noise:.4f}",
        ]

    def as_json(self) -> dict[str, object]:
        """The result as JSON."""
        return asdict(self)


def run(config: Config, rounds: int, steps: int) -> RecordingCost:
    """Measure on this machine, in as many processes as the configuration has ranks; `steps` in a round at least."""
    config = config.measured()
    every = max(1, config.measure.every)
    steps = ceil(steps / every) * every
    world = config.cluster.nodes * config.cluster.ranks_per_node
    config = spawn.resolve_device(config, world, "bench measure")
    with spawn.processes(_work, world, config, rounds, steps) as folder:
        seconds = json.loads((folder / "seconds.json").read_text())
    return RecordingCost(
        seconds=median(seconds["bare"]) / steps,
        off=ratio(seconds, "off", "bare"),
        on=ratio(seconds, "on", "off"),
        all=ratio(seconds, "all", "off"),
        every=config.measure.every,
        noise=ratio(seconds, "again", "bare"),
        rounds=rounds,
        steps=steps,
        world=world,
        machine=f"{platform.machine()}, torch {torch.__version__}",
        date=date.today().isoformat(),
    )


SIMULATED_STEPS = 20
"""About as many as `launch --measure` records."""


def simulated(config: Config, world: int) -> simulated_recording.SimulationResult:
    """The simulated cost of gathering records on rank 0 of `world` ranks with the configuration's layers.

    Experts are shared by 64 neighbours, or by all where there are fewer.
    """
    layers = len(config.model.moe_blocks)
    return simulated_recording.run(simulated_recording.SimulatedRun(world, layers, SIMULATED_STEPS, min(64, world)))


def _work(rank: int, world: int, config: Config, rounds: int, steps: int, folder: str) -> None:
    from moesys.data.corpus import open_corpus

    with spawn.process_group(rank, world, config, folder) as mesh:
        trainer = Trainer(config, mesh, open_corpus(config))
        recorders = [StepRecorder(_every(config, n), mesh, Path(folder), 0) for n in (config.measure.every, 1)]
        seconds = interleave(_sides(trainer, recorders, steps), rounds, alone(mesh.device), warmup=1)
        if rank == 0:
            write_json(Path(folder) / "seconds.json", seconds)


def _every(config: Config, steps: int) -> Config:
    measure = config.measure.model_copy(update={"every": steps, "steps": [], "audit": False})
    return config.model_copy(update={"measure": measure})


def _sides(trainer: Trainer, recorders: list[StepRecorder], steps: int) -> dict[str, Callable[[], object]]:
    def off() -> None:
        for _ in range(steps):
            demand_numbers(trainer.train_step(), "bench measure")
        dist.barrier()

    def bare() -> None:
        with patch.object(comm, "record", _nothing):
            off()

    def recorded(recorder: StepRecorder) -> None:
        for _ in range(steps):
            with recorder.step(trainer.step + 1) as recording:
                demand_numbers(trainer.train_step(), "bench measure")
            explained(recorder.keep(recording, trainer.load))
        explained(recorder.flush())
        dist.barrier()

    def explained(steps: list[Summary]) -> None:
        for step in steps:
            explain([step])

    on, every = (partial(recorded, recorder) for recorder in recorders)
    return {"bare": bare, "off": off, "on": on, "all": every, "again": bare}


@contextmanager
def _nothing(audit: bool = False) -> Iterator[list[comm.CollectiveRecord]]:
    yield []
