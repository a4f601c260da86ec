"""What one training step gathers, sums and keeps whole, in worker processes; importable by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from batches import forget, join, start
from sabotage import in_small_buckets

from moesys.config import Config

RUNS, BACK = "runs", "back"
"""Kinds of marks among events: forward, or backward, has come to a layer."""


def observed(cases: Mapping[str, Config], world: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each case, by rank: what its first step did (`_observe`)."""
    start(_work, world, dict(cases), folder)
    ranks = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [found[name] for found in ranks] for name in cases}


def _work(rank: int, world: int, cases: dict[str, Config], folder: Path) -> None:
    join(rank, world, folder)
    in_small_buckets()
    found = {}
    for name, config in cases.items():
        with SABOTAGE.get(name, nullcontext)():
            found[name] = _observe(config)
        forget()
    torch.save(found, folder / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _freed_after_forward() -> Iterator[None]:
    """FSDP frees what forward has used, as it does by itself, under a pipeline too."""
    from moesys.parallel import data

    plain = data._shard

    def shard(*arguments: Any, **more: Any) -> Any:
        return plain(*arguments[:4], **(more | {"keep": False}))

    with patch.object(data, "_shard", shard):
        yield


@contextmanager
def _asked_for_late() -> Iterator[None]:
    """Weights are gathered when they are needed."""
    from moesys.parallel import data

    with patch.object(data, "_prefetch"):
        yield


@contextmanager
def _summed_at_the_end() -> Iterator[None]:
    """Sums of gradients start when backward has ended, in a copy of them all."""
    from moesys.parallel import buckets
    from moesys.parallel.gradients import Gradients

    never = patch.object(Gradients, "last_backward", lambda *_: nullcontext())
    with never, patch.object(buckets, "BUCKET_BYTES", 2**30):
        yield


SABOTAGE: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "freed after forward": _freed_after_forward,
    "asked for late": _asked_for_late,
    "summed at the end": _summed_at_the_end,
}


def _observe(config: Config) -> dict[str, Any]:
    """Of the second step: collectives and marks in order; elements of the units that FSDP gathers; whether all weights
    lie on their shards after steps and evaluation; and what sums of gradients cost beside these (`_sums`)."""
    from moesys.data.corpus import open_corpus
    from moesys.measure.record.torch_collectives import record_torch_collectives
    from moesys.parallel import comm
    from moesys.train.loop import Trainer
    from moesys.train.native import connect

    trainer = Trainer(config, connect(config), open_corpus(config))
    parts = trainer.engine.model.parts
    trainer.train_step()
    after_step = _sharded(parts)
    trainer.evaluate()
    after_evaluation = _sharded(parts)
    if not config.train.compile:
        _mark(parts)
    with comm.record() as events, record_torch_collectives():
        trainer.train_step()
    return {
        "events": [
            (e.kind, e.bytes, len(e.ranks), e.tag.layer if e.kind in (RUNS, BACK) else e.tag.part) for e in events
        ],
        "sharded": (after_step, after_evaluation, _sharded(parts)),
        "units": _units(parts),
        "sums": _sums(trainer.engine.model),
    }


def _sums(model: Any) -> tuple[int, int]:
    """Bytes of all gradients; and at the fullest moment of their sum, with what is beside them then."""
    from moesys.measure.peak_memory import peak_bytes
    from moesys.parallel.gradients import local

    gradients = model.gradients

    def step() -> None:
        for p in gradients.parameters:
            p.grad = torch.ones_like(p)
        gradients.reduce()

    peak = peak_bytes(step, torch.device("cpu"))
    grads = [local(p.grad) for p in gradients.parameters]
    return sum(grad.nbytes for grad in grads), peak


def _sharded(parts: Any) -> bool:
    """Whether every parameter that FSDP manages is a shard."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from moesys.parallel.data import routers

    alone = {id(p) for part in parts for p in routers(part)}
    return all(
        isinstance(p, DTensor)
        for part in parts
        if isinstance(part, FSDPModule)
        for p in part.parameters()
        if id(p) not in alone
    )


def _units(parts: Any) -> dict[str, int]:
    """Bytes of each module that FSDP gathers at once, whole, by its name."""
    from torch.distributed.fsdp import FSDPModule

    from moesys.parallel.data import routers
    from moesys.parallel.initialise import canonical

    sizes: dict[str, int] = {}
    for part in parts:
        names = [n for n, m in part.named_modules() if isinstance(m, FSDPModule)]
        if not names:
            continue
        alone = {id(p) for p in routers(part)}
        for name, p in part.named_parameters():
            if id(p) not in alone:
                owner = max((n for n in names if not n or name.startswith(n + ".")), key=len)
                owner = canonical(owner + ".", False)[:-1]
                sizes[owner] = sizes.get(owner, 0) + p.numel() // _ways(p)
    return sizes


def _ways(p: Any) -> int:
    """Ways that expert parallelism splits a parameter."""
    axes = zip(p.device_mesh.mesh_dim_names, p.device_mesh.shape, strict=True)
    return next((size for axis, size in axes if axis == "ep"), 1)


def _mark(parts: Any) -> None:
    """Let events tell when forward computes in each block, and when backward comes to its output."""
    for part in parts:
        for name, block in part.layers.items():
            block.attention.register_forward_pre_hook(lambda *_, n=name: _note(RUNS, n))
            block.register_forward_hook(lambda _, __, out, n=name: _watch(out, n))


def _watch(out: torch.Tensor, name: str) -> None:
    if out.requires_grad:
        out.register_hook(lambda _: _note(BACK, name))


def _note(kind: str, layer: str) -> None:
    from moesys.parallel import comm

    comm.add(comm.CollectiveRecord(kind, 0, 0.0, 0.0, 0.0, comm.Tag(layer=layer)))
