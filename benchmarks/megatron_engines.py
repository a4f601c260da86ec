"""The sides of `bench megatron` in worker processes: engines, batches and the steps that are timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.data.corpus import Corpus, open_corpus
from moesys.data.samples import Samples
from moesys.errors import TrainingError
from moesys.files import write_json
from moesys.measure.interleaved_timing import alone, interleave
from moesys.train import native, spawn
from moesys.train.engine import Engine

PLUG_IN, OWN, NATIVE = "plug-in", "megatron", "native"

TOLD = "told.json"
"""Name of the file that rank 0 leaves in the folder: seconds and first losses by side, and the device."""

Batch = tuple[torch.Tensor, torch.Tensor, range]


def work(rank: int, world: int, config: Config, rounds: int, steps: int, folder: str) -> None:
    """Time all sides on this rank. Collective over the world."""
    with spawn.process_group(rank, world, config, folder) as mesh:
        corpus = open_corpus(config)
        sides = {PLUG_IN: engine(config, mesh, corpus, True), OWN: engine(config, mesh, corpus, False)}
        own = config.model_copy(update={"engine": "native"})
        sides[NATIVE] = native.build(own, native.connect(own), corpus.vocab_size)
        batches = _batches(config, mesh, corpus, steps)
        losses = {name: _loss(engine, *batches[0]) for name, engine in sides.items()}
        seconds = interleave({n: _step(e, batches) for n, e in sides.items()}, rounds, alone(mesh.device), warmup=1)
        if rank == 0:
            device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu"
            write_json(Path(folder) / TOLD, {"seconds": seconds, "losses": losses, "device": device})


def engine(config: Config, ranks: Any, corpus: Corpus, plug_in: bool) -> Engine:
    """Megatron's model with this project's MoE layer, or else with its own."""
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
        # Megatron's all-to-all needs an uneven all-gather where experts are split, which gloo has not.
        "moe_token_dispatcher_type": "allgather" if config.parallel.etp > 1 else "alltoall",
    }  # fmt: skip
    return MegatronEngine(config, ranks, corpus.vocab_size, plug_in=False, **more)


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
