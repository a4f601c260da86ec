"""Training steps of one model three ways, interleaved in the same processes on the same batches.

Megatron-Core's model with this project's MoE layer, the same with Megatron's own, and the native engine.

moesys bench megatron configs/quickstart-megatron.yaml
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict, dataclass
from datetime import date
from statistics import median

import torch

from moesys.benchmarks.megatron_engines import NATIVE, OWN, PLUG_IN, TOLD, work
from moesys.config.schema import Config, MoEConfig
from moesys.errors import ConfigError, Problem
from moesys.files import read_json
from moesys.measure.interleaved_timing import ratio
from moesys.train import spawn
from moesys.train.validate import load_checked
from moesys.words import plural


@dataclass(frozen=True)
class Result:
    """Medians over `rounds`, each of `steps` training steps of every side.

    Attributes:
        seconds: of a step, by side.
        plug_in: seconds with this project's MoE layer / with Megatron's own.
        native: seconds of the native engine / of Megatron's model with this project's layer.
        losses: of the first step, by side: they are the same model.
    """

    seconds: dict[str, float]
    plug_in: float
    native: float
    losses: dict[str, float]
    rounds: int
    steps: int
    world: int
    machine: str
    date: str

    def lines(self) -> list[str]:
        """The result as text."""
        names = {
            PLUG_IN: "Megatron's model, this project's MoE layer",
            OWN: "Megatron's model, its own MoE layer",
            NATIVE: "native engine",
        }
        rows = [
            f"  {names[k]:<44} {s * 1e3:>8.1f} ms   first loss {self.losses[k]:.5f}" for k, s in self.seconds.items()
        ]
        return [
            f"{self.machine}, {self.date}, {plural(self.world, 'rank')}",
            f"  medians of {plural(self.rounds, 'interleaved round')} of {plural(self.steps, 'step')}",
            *rows,
            f"  this project's layer / Megatron's own        {self.plug_in:>8.2f}",
            f"  native engine / Megatron's model             {self.native:>8.2f}",
        ]

    def as_json(self) -> dict[str, object]:
        """All figures by name."""
        return asdict(self)


def command(arguments: argparse.Namespace) -> Result:
    """The result of `moesys bench megatron`."""
    return run(load_checked(arguments.config, arguments.overrides), arguments.rounds, arguments.steps)


def run(config: Config, rounds: int, steps: int) -> Result:
    """Measure on this machine, in as many processes as the configuration has ranks.

    Raises:
        ConfigError: the MoE layer is not one that Megatron's own can be.
    """
    check(config)
    world = config.cluster.nodes * config.cluster.ranks_per_node
    config = spawn.resolve_device(config, world, "bench megatron")
    with spawn.processes(work, world, config, rounds, steps) as folder:
        told = read_json(folder / TOLD, "run the benchmark again")
    seconds = told["seconds"]
    return Result(
        seconds={side: median(values) / steps for side, values in seconds.items()},
        plug_in=ratio(seconds, PLUG_IN, OWN),
        native=ratio(seconds, NATIVE, PLUG_IN),
        losses=told["losses"],
        rounds=rounds,
        steps=steps,
        world=world,
        machine=f"{platform.machine()}, torch {torch.__version__}, {told['device']}",
        date=date.today().isoformat(),
    )


PLAIN = (
    *("gate", "activation", "bias", "normalize", "scale", "capacity_factor", "zero_computation", "bias_rate"),
    *("sequence_balance_loss", "global_balance_loss", "importance_loss", "load_loss", "shared_mix", "lora_rank"),
)
"""Keys of model.moe that must have their defaults."""


def check(config: Config) -> None:
    """Refuse all but softmax top-k, dropless, with SwiGLU experts, balance and z losses, and plain shared experts."""
    moe = config.model.moe
    plain = MoEConfig(experts=1, ffn_hidden=1)
    rule = "is not compared with Megatron's own layer here"
    problems = [
        Problem(f"model.moe.{key}", rule, "leave it at its default")
        for key in PLAIN
        if moe is not None and getattr(moe, key) != getattr(plain, key)
    ]
    if moe is None:
        problems = [Problem("model.moe", "there is no MoE layer to compare", "add model.moe")]
    if config.engine != "megatron":
        problems.append(Problem("engine", "compares Megatron's model", "set engine: megatron", given=config.engine))
    if problems:
        raise ConfigError(problems)
