"""Compares three ways to train one model, interleaved in the same processes on the same batches.

The three are Megatron-Core's model with this project's MoE layer, the same with Megatron's own, and the native engine.

moesys bench megatron configs/quickstart-megatron.yaml
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesys.config.schema import Config, MoEConfig
from moesys.data.corpus import Corpus, open_corpus
from moesys.data.samples import Samples
from moesys.errors import ConfigError, Problem, TrainingError
from moesys.files import write_json
from moesys.measure.interleave import alone, interleave, ratio
from moesys.train import native, spawn
from moesys.train.engine import Engine
from moesys.words import plural

PLUG_IN, OWN, NATIVE = "plug-in", "megatron", "native"


@dataclass(frozen=True)
class MegatronComparison:
    """Medians over `rounds`, each of `steps` training steps of every side.

    Attributes:
        seconds: of a step, by side.
        plug_in: seconds with this project's MoE layer / with Megatron's own.
        native: seconds of the native engine / of Megatron's model with this project's layer.
        losses: of the first step, by side. They are equal, because the model is the same.
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
        """The result as lines of text."""
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
        """The result as JSON."""
        return asdict(self)


def run(config: Config, rounds: int, steps: int) -> MegatronComparison:
    """Measure on this machine, in as many processes as the configuration has ranks.

    Raises:
        ConfigError: Megatron's own layer cannot be this MoE layer.
    """
    check(config)
    world = config.cluster.nodes * config.cluster.ranks_per_node
    config = spawn.resolve_device(config, world, "bench megatron")
    with spawn.processes(_work, world, config, rounds, steps) as folder:
        found = json.loads((folder / "comparison.json").read_text())
    seconds = found["seconds"]
    return MegatronComparison(
        seconds={side: median(values) / steps for side, values in seconds.items()},
        plug_in=ratio(seconds, PLUG_IN, OWN),
        native=ratio(seconds, NATIVE, PLUG_IN),
        losses=found["losses"],
        rounds=rounds,
        steps=steps,
        world=world,
        machine=f"{platform.machine()}, torch {torch.__version__}, {found['device']}",
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


def _work(rank: int, world: int, config: Config, rounds: int, steps: int, folder: str) -> None:
    with spawn.process_group(rank, world, config, folder) as mesh:
        corpus = open_corpus(config)
        sides = {PLUG_IN: _engine(config, mesh, corpus, True), OWN: _engine(config, mesh, corpus, False)}
        own = config.model_copy(update={"engine": "native"})
        sides[NATIVE] = native.build(own, native.connect(own), corpus.vocab_size)
        batches = _batches(config, mesh, corpus, steps)
        losses = {name: _loss(engine, *batches[0]) for name, engine in sides.items()}
        seconds = interleave({n: _step(e, batches) for n, e in sides.items()}, rounds, alone(mesh.device), warmup=1)
        if rank == 0:
            device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu"
            found = {"seconds": seconds, "losses": losses, "device": device}
            write_json(Path(folder) / "comparison.json", found)


def _engine(config: Config, ranks: Any, corpus: Corpus, plug_in: bool) -> Engine:
    from megatron.core.models.gpt import gpt_layer_specs

    from moesys.megatron.training import MegatronEngine

    if plug_in:
        return MegatronEngine(config, ranks, corpus.vocab_size)
    moe = config.model.moe
    assert moe is not None
    more = {
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": moe.balance_loss,
        "moe_z_loss_coeff": moe.z_loss or None, "moe_router_dtype": "fp32",
        "moe_grouped_gemm": gpt_layer_specs.HAVE_TE and ranks.device.type == "cuda",
        "moe_shared_expert_intermediate_size": moe.shared_width or None,
        # With split experts, Megatron's all-to-all needs an uneven all-gather, which gloo lacks.
        "moe_token_dispatcher_type": "allgather" if config.parallel.etp > 1 else "alltoall",
    }  # fmt: skip
    return MegatronEngine(config, ranks, corpus.vocab_size, plug_in=False, **more)


Batch = tuple[torch.Tensor, torch.Tensor, range]


def _batches(config: Config, mesh: Any, corpus: Corpus, steps: int) -> list[Batch]:
    """This data rank's tokens, labels and sample numbers of the first steps."""
    t, d, place = config.train, mesh.degrees, mesh.place
    samples, share = Samples(corpus.train, t.seq_len, config.seed), t.global_batch // d.dp
    rank = place["dp_replicate"] * d.dp_shard + place["dp_shard"]
    found = []
    for step in range(steps):
        start = step * t.global_batch + rank * share
        numbers = range(start, start + share)
        windows = torch.from_numpy(np.stack([samples[n] for n in numbers])).to(mesh.device)
        found.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), numbers))
    return found


def _loss(engine: Engine, tokens: torch.Tensor, labels: torch.Tensor, numbers: range) -> float:
    """The mean loss of a batch before training."""
    total = engine.evaluate(tokens, labels, numbers).double()
    dist.all_reduce(total)
    return total.item() / engine.mesh.degrees.tp


def _step(engine: Engine, batches: list[Batch]) -> Callable[[], None]:
    rate = engine.config.train.optimizer.lr

    def steps() -> None:
        updates = []
        for batch in batches:
            engine.train(*batch)
            updates.append(engine.update(rate))
        for update in updates:
            if update.skipped:
                norm = float(update.norm)
                raise TrainingError(f"bench megatron: a step is not finite: the norm of its gradients is {norm}")
        dist.barrier()

    return steps
