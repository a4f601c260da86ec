"""Which graphs a model's blocks are compiled to: by count, and by what is in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from support import changed
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesys.config.schema import Config
from moesys.parallel import comm, compose
from moesys.parallel.degrees import resolve
from moesys.parallel.mesh import ParallelMesh
from moesys.parallel.recompute import prepare

PARTS = ("run_dense", "route", "run_experts", "run_shared", "finish")
"""Of a block, as `Block.parts` names them."""

FILE = {"run_shared": "layer"}
"""Where a part is defined if not in block.py: other files have functions of the same names."""

VOCABULARY, LENGTH = 32, 8

RAW: dict[str, Any] = {
    "model": {
        "hidden": 16,
        "layers": 2,
        "vocab_size": VOCABULARY,
        "attention": {"heads": 2, "kv_heads": 2, "head_dim": 8},
    },
    "train": {"seq_len": LENGTH, "global_batch": 2, "micro_batch": 1, "compile": True},
    "data": {"kind": "text", "path": "unread"},
    "cluster": {"device": "cpu", "ranks_per_node": 2},
}


@dataclass
class Graphs:
    """A backend of torch.compile that runs graphs as they are, and remembers them.

    `made` counts graphs by the part that they belong to; `inside` are the operations of each part's.
    """

    made: Counter[str] = field(default_factory=Counter)
    inside: dict[str, set[str]] = field(default_factory=dict)

    def __call__(self, module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        nodes = list(_nodes(module))
        traces = "".join(n.stack_trace or "" for n in nodes)
        part = next((part for part in PARTS if _place(part).search(traces)), "elsewhere")
        self.made[part] += 1
        self.inside.setdefault(part, set()).update(str(getattr(n.target, "__name__", n.target)) for n in nodes)
        return module.forward

    def __str__(self) -> str:
        breaks = sum(counters["graph_break"].values())
        counts = [f"{part} {self.made[part]}" for part in (*PARTS, "elsewhere") if self.made[part]]
        return ", ".join([*counts, f"breaks {breaks}"])


def _place(part: str) -> re.Pattern[str]:
    """How a stack's trace names a part."""
    return re.compile(rf'/{FILE.get(part, "block")}\.py", line \d+, in {part}\n')


def _nodes(module: nn.Module) -> Iterator[Node]:
    """Of a graph, and of those inside it that are checkpointed."""
    for child in module.modules():
        if isinstance(child, GraphModule):
            yield from child.graph.nodes


@contextmanager
def alone(world: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `world`, of whom the others are as this one: what it sends comes to it."""
    start = comm._start

    def answered(kind: str, tag: Any, op: Any, x: Tensor, *arguments: Any, **options: Any) -> comm.Work:
        if kind.startswith("all_to_all"):
            return comm.Work(x.clone(), None)
        return start(kind, tag, op, x, *arguments, **options)

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    comm._start = answered
    try:
        yield
    finally:
        comm._start = start
        dist.destroy_process_group()


def compiled(raw: dict[str, Any], world: int) -> tuple[Graphs, list[str], compose.Composed]:
    """The graphs of three steps of other tokens each, how they stood after each step, and the model."""
    torch.compiler.reset()
    counters.clear()
    config, graphs, after = Config.model_validate(changed(RAW, raw)), Graphs(), []
    degrees, problems = resolve(config, world)
    assert degrees is not None, problems
    made = compose.prepare
    compose.prepare = lambda block, recompute, on: prepare(block, recompute, on, backend=graphs)  # type: ignore[assignment]
    try:
        mesh = ParallelMesh(degrees, torch.device("cpu"), 60.0)
        model = compose.compose(config, mesh, VOCABULARY)
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            count = config.train.global_batch // degrees.dp
            ids = torch.randint(VOCABULARY, (count, LENGTH), generator=draw)
            model.train(ids, ids, range(count))
            model.gradients.reduce()  # waits for the sums that backward started
            model.after_step(torch.zeros((), dtype=torch.bool))
            after.append(str(graphs))
    finally:
        compose.prepare = made
    return graphs, after, model
