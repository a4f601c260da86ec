"""Benchmarks of training: against transformers in one process, and how long a launch takes.

moesys bench train configs/quickstart.yaml
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from time import monotonic, perf_counter, sleep

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesys import leftovers
from moesys.config.schema import Config
from moesys.data.corpus import open_corpus
from moesys.errors import MoesysError
from moesys.files import json_objects
from moesys.loopback import stay_here
from moesys.measure import checkout
from moesys.models.parts.model import mixers
from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import ParallelMesh
from moesys.train.guard import demand_numbers
from moesys.train.loop import Trainer
from moesys.train.optimizer import build
from moesys.train.verify import reference
from moesys.words import plural


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
        return asdict(self)


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
    stay_here()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = ParallelMesh(Degrees(), torch.device("cpu"), config.launch.timeout_s)
        trainer = Trainer(config, mesh, open_corpus(config))
        sides = {
            "moesys": lambda: demand_numbers(trainer.train_step(), "bench train"),
            "transformers": _transformers(config, trainer),
        }
        tokens = config.train.global_batch * config.train.seq_len
        for step in sides.values():
            step()
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                begin = perf_counter()
                for _ in range(steps):
                    sides[name]()
                speeds[name].append(steps * tokens / (perf_counter() - begin))
        return speeds
    finally:
        dist.destroy_process_group()


def _transformers(config: Config, trainer: Trainer) -> Callable[[], None]:
    """One training step of transformers' Mixtral of the same shape, losses and optimizer."""
    with checkout.hidden():
        from transformers import MixtralConfig, MixtralForCausalLM

    m, t = config.model, config.train
    if m.moe is None or m.attention.kind != "gqa" or m.moe.shared_experts or m.moe.every > 1 or m.moe.first_dense:
        raise MoesysError("bench train compares with Mixtral: every layer MoE, gqa, no shared experts")
    vocabulary = trainer.vocab_size
    theirs = MixtralConfig(
        vocab_size=vocabulary, hidden_size=m.hidden, intermediate_size=m.moe.ffn_hidden, num_hidden_layers=m.depth,
        num_attention_heads=m.attention.heads, num_key_value_heads=m.attention.kv_heads or m.attention.heads,
        head_dim=mixers(m)[0].head_sizes()[2], num_local_experts=m.moe.experts, num_experts_per_tok=m.moe.top_k,
        router_aux_loss_coef=m.moe.balance_loss, output_router_logits=True, tie_word_embeddings=m.tie_embeddings,
        max_position_embeddings=t.seq_len, use_cache=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: nn.Module = MixtralForCausalLM(theirs)
    optimizer = build(t.optimizer, dict(model.named_parameters()), lambda name: "norm" not in name)
    batches = _batches(config, trainer)
    passes = t.global_batch // t.micro_batch

    def step() -> None:
        windows = next(batches)
        for chunk in windows.chunk(passes):
            labels = chunk[:, 1:].contiguous()
            out = model(input_ids=chunk[:, :-1], labels=labels, shift_labels=labels)
            (out.loss / passes).backward()
        if t.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), t.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batches(config: Config, trainer: Trainer) -> Iterator[Tensor]:
    size, seen = config.train.global_batch, 0
    while True:
        yield torch.from_numpy(np.stack([trainer.samples[n] for n in range(seen, seen + size)]))
        seen += size


def first_step(path: Path, overrides: list[str], launcher: str) -> float:
    """Seconds from the command to the first training step's record."""
    with leftovers.temporary("bench") as folder:
        changes = [*overrides, "train.steps=1", "train.eval_sequences=1", "name=first", f"output.runs={folder}"]
        command = [sys.executable, "-m", "moesys.cli", "launch", str(path), "--launcher", launcher, *changes]
        begin = monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        metrics = folder / "first" / "metrics.jsonl"
        while process.poll() is None and not _has_step(metrics):
            sleep(0.02)
        seconds = monotonic() - begin
        _, errors = process.communicate()
        if process.returncode:
            raise MoesysError(f"{' '.join(command)} failed:\n{errors}")
        return seconds


def _has_step(metrics: Path) -> bool:
    return any("loss" in record for record in json_objects(metrics))
