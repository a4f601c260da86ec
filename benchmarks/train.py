"""Training of one model here and by transformers, in one process, and how long a launch takes.

moesys bench train configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

from moesys.benchmarks import mixtral
from moesys.benchmarks.first_step import first_step
from moesys.config.schema import Config
from moesys.data.corpus import open_corpus
from moesys.loopback import stay_here
from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import ParallelMesh
from moesys.train.guard import demand_numbers
from moesys.train.loop import Trainer
from moesys.train.validate import load_checked
from moesys.train.verify import reference
from moesys.words import plural

LAUNCHERS = ("local", "ray")
"""Whose launches are timed."""


@dataclass(frozen=True)
class Result:
    """Median tokens per second of both sides over interleaved rounds, and seconds to the first step."""

    ours: float
    transformers: float
    ratio: float
    rounds: int
    steps_per_round: int
    first_step_seconds: dict[str, float]
    machine: str
    date: str

    def as_json(self) -> dict[str, object]:
        """All figures by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as text."""
        return [
            f"{self.machine}, {self.date}",
            f"  medians of {plural(self.rounds, 'interleaved round')} of {plural(self.steps_per_round, 'step')}",
            f"  moesys        {self.ours:>10,.0f} tokens/s, one process",
            f"  transformers  {self.transformers:>10,.0f} tokens/s, the same weights, batches and losses",
            f"  ratio         {self.ratio:>10.2f}",
            *(f"  {name:<6} from command to first step {s:>6.1f} s" for name, s in self.first_step_seconds.items()),
        ]


def command(arguments: argparse.Namespace) -> Result:
    """The result of `moesys bench train`."""
    config = load_checked(arguments.config, arguments.overrides)
    return run(config, arguments.rounds, arguments.steps, LAUNCHERS, arguments.config, arguments.overrides)


def run(
    config: Config, rounds: int, steps: int, launchers: tuple[str, ...], path: Path, overrides: list[str]
) -> Result:
    """Both benchmarks of `config`, which `path` and `overrides` describe for a fresh process."""
    speeds = compare(reference(config), rounds, steps)
    ours, theirs = (statistics.median(speeds[name]) for name in ("moesys", "transformers"))
    ratio = statistics.median(a / b for a, b in zip(speeds["moesys"], speeds["transformers"], strict=True))
    starts = {launcher: first_step(path, overrides, launcher) for launcher in launchers}
    machine = f"{platform.machine()}, {plural(os.cpu_count() or 1, 'core')}, torch {torch.__version__}"
    return Result(ours, theirs, ratio, rounds, steps, starts, machine, date.today().isoformat())


def compare(config: Config, rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each round, one round of each side after the other, on the same batches."""
    with sides(config) as both:
        tokens = config.train.global_batch * config.train.seq_len
        for step in both.values():
            step()
        speeds: dict[str, list[float]] = {name: [] for name in both}
        for number in range(rounds):
            for name in list(both)[:: 1 if number % 2 else -1]:
                begin = perf_counter()
                for _ in range(steps):
                    both[name]()
                speeds[name].append(steps * tokens / (perf_counter() - begin))
        return speeds


@contextmanager
def sides(config: Config) -> Iterator[dict[str, Callable[[], float]]]:
    """The next training step of either side, which returns the mean loss of its tokens.

    Both start from the same weights, and take the same batches and learning rates. Losses that Mixtral lacks are off.
    """
    mixtral.check(config)
    config = mixtral.comparable(config)
    stay_here()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = ParallelMesh(Degrees(), torch.device("cpu"), config.launch.timeout_s)
        trainer = Trainer(config, mesh, open_corpus(config))

        def ours() -> float:
            record = trainer.train_step()
            demand_numbers(record, "bench train")
            return float(record["loss"])

        yield {"moesys": ours, "transformers": mixtral.step(config, trainer)}
    finally:
        dist.destroy_process_group()
