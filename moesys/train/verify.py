"""The proof of equality: a parallel run computes what one process computes.

Both train the same steps in float32 (or float64) from the same seed on the same data; every loss,
every gradient of every step and every final parameter is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesys.config.schema import Config, ParallelConfig
from moesys.errors import Problem
from moesys.parallel import dimension
from moesys.parallel.mesh import Ranks
from moesys.train import machine, spawn
from moesys.train.guard import demand_numbers

if TYPE_CHECKING:
    from moesys.train.loop import Trainer

FLOOR = 1e-3
"""A gradient with a root-mean-square below this share of the model's is rounding noise around zero (the bias of a key,
for example). Its difference is taken relative to that share, and its parameter, which Adam moves by the sign of noise,
is not compared."""

TOLERANCES = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 1e-2}
"""Largest relative difference that rounding explains, by type. In bfloat16 (8 bits), near ties of the gate are decided
differently. So it proves little there, and finds gross mistakes."""

EPS = 1e-5
"""Least eps of Adam in both runs. If a gradient is as small as eps, Adam turns rounding noise into steps of size lr:
the comparison would show this noise instead of the parallelism."""


@dataclass
class Trace:
    """The results of a run: losses and norms per step, gradients per step and final parameters by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Difference:
    """The largest relative difference of one kind, and its place."""

    value: float = 0.0
    where: str = ""

    def update(self, value: float, where: str) -> None:
        """Keep `value` and its place if it is larger, or NaN."""
        if not value <= self.value:  # also a NaN
            self.value, self.where = value, where


@dataclass
class EqualityReport:
    """Largest relative differences between a parallel run and one process."""

    world: int
    steps: int
    tolerance: float
    loss: Difference = field(default_factory=Difference)
    norm: Difference = field(default_factory=Difference)
    gradient: Difference = field(default_factory=Difference)
    parameter: Difference = field(default_factory=Difference)

    @property
    def passed(self) -> bool:
        """True if no difference is above the tolerance."""
        kinds = (self.loss, self.norm, self.gradient, self.parameter)
        return all(kind.value <= self.tolerance for kind in kinds)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, with `passed`."""
        return {**asdict(self), "passed": self.passed}


def reference(config: Config, engine: str | None = None) -> Config:
    """The run in one process: no parallelism, nothing recomputed or compiled; by default with the same engine."""
    return config.model_copy(
        update={
            "engine": engine or config.engine,
            "parallel": ParallelConfig(),
            "cluster": config.cluster.model_copy(update={"nodes": 1, "ranks_per_node": 1}),
            "train": config.train.model_copy(update={"recompute": "none", "compile": False}),
        }
    )


def untried(config: Config, dtype: str, against: str | None = None) -> list[Problem]:
    """Problems that prevent a comparison in this type, or with this engine."""
    other = reference(config, against)
    if dtype == "float64" and "megatron" in (config.engine, other.engine):
        rule = "computes in float32 and bfloat16"
        return [Problem("engine", rule, "remove --dtype float64, or compare native with native", given="megatron")]
    return dimension.check(other, 1)


def unprovable(config: Config, tolerance: float) -> list[Problem]:
    """Problems of keys that make a run differ from one process on purpose by more than rounding explains."""
    p = config.parallel
    if p.dispatch.payload == "model" or p.ep * p.etp == 1:
        return []
    rule = f"rounds rows to 4 significant bits on their way to experts: nothing equals one process to {tolerance:g}"
    remedy = "add parallel.dispatch.payload=model, which proves all but that rounding, or choose a --tolerance"
    return [Problem("parallel.dispatch.payload", rule, remedy, given="fp8")]


def comparable(config: Config, dtype: str = "float32") -> Config:
    """The run in the type of the comparison, with an optimizer that does not enlarge rounding."""
    optimizer = config.train.optimizer
    steady = optimizer.model_copy(update={"eps": max(optimizer.eps, EPS)})
    compute = "bfloat16" if dtype == "bfloat16" else "float32"
    train = config.train.model_copy(update={"dtype": compute, "optimizer": steady})
    return config.model_copy(update={"train": train})


def trace(
    config: Config, world: int, steps: int, dtype: str = "float32", prepare: Callable[[], None] | None = None
) -> Trace:
    """Train `steps` steps in `world` processes on this machine; returns their results.

    `dtype`: float32, float64, or bfloat16, which is the run's own mixed precision: bfloat16 computation
    on float32 weights. `prepare`, importable by name, is called in every process first.
    """
    config = comparable(config, dtype)
    merged = Trace()
    with spawn.processes(_work, world, config, steps, dtype, prepare) as folder:
        for path in sorted(folder.glob("trace-*.pt")):
            _merge(merged, torch.load(path, weights_only=False))
    return merged


def _work(
    rank: int, world: int, config: Config, steps: int, dtype: str, prepare: Callable[[], None] | None, folder: str
) -> None:
    if prepare is not None:
        prepare()
    with spawn.process_group(rank, world, config, folder) as mesh:
        found, _ = observe(config, mesh, steps, torch.float64 if dtype == "float64" else torch.float32)
        if not any(place for axis, place in mesh.place.items() if axis != "pp"):
            torch.save(found, f"{folder}/trace-{rank}.pt")


def observe(config: Config, mesh: Ranks, steps: int, weights: torch.dtype) -> tuple[Trace, Trainer]:
    """Train `steps` steps; returns the results of this rank's stages and the trainer. Collective."""
    from moesys.data.corpus import open_corpus
    from moesys.train.loop import Trainer

    trainer = Trainer(config, mesh, open_corpus(config), weights)
    found = Trace()
    world = mesh.degrees.world
    ranks = f"{world} process{'es' * (world > 1)}"
    trainer.before_update = lambda: found.gradients.append(trainer.engine.gradients())
    for _ in range(steps):
        record = trainer.train_step()
        demand_numbers(record, f"{config.name} in {ranks} cannot be compared")
        found.losses.append(record["loss"])
        found.norms.append(record["grad_norm"])
    found.parameters = trainer.engine.weights()
    return found, trainer


def _merge(into: Trace, part: Trace) -> None:
    """Add the tensors of another pipeline stage."""
    into.losses, into.norms = part.losses, part.norms
    into.parameters |= part.parameters
    if not into.gradients:
        into.gradients = [{} for _ in part.gradients]
    for whole, stage in zip(into.gradients, part.gradients, strict=True):
        whole |= stage


def compare(found: Trace, expected: Trace, world: int, tolerance: float) -> EqualityReport:
    """Differences ‖a − b‖ / ‖b‖ per tensor, |a − b| / |b| of losses and norms; the largest of each kind."""
    report = EqualityReport(world, len(expected.losses), tolerance)
    for worst, ours, theirs in (
        (report.loss, found.losses, expected.losses),
        (report.norm, found.norms, expected.norms),
    ):
        for step, (x, y) in enumerate(zip(ours, theirs, strict=True), 1):
            worst.update(abs(x - y) / abs(y), f"step {step}")
    moved: set[str] = set()
    for step, pair in enumerate(zip(found.gradients, expected.gradients, strict=True), 1):
        moved |= _compare_gradients(report.gradient, *pair, step)
    buffers = expected.parameters.keys() - expected.gradients[0].keys()
    for name in sorted(moved | buffers):
        a, b = found.parameters[name].double(), expected.parameters[name].double()
        report.parameter.update(((a - b).norm() / b.norm().clamp(min=1e-30)).item(), name)
    return report


def _compare_gradients(worst: Difference, found: dict[str, Tensor], expected: dict[str, Tensor], step: int) -> set[str]:
    """Compare the gradients of a step; returns the names of those that are more than noise."""
    if missing := found.keys() ^ expected.keys():
        worst.update(float("inf"), f"step {step}, only one run has {sorted(missing)[0]}")
        return set()
    squares = sum(float(g.double().square().sum()) for g in expected.values())
    typical = sqrt(squares / sum(g.numel() for g in expected.values()))
    moved = set()
    for name, b in expected.items():
        size, floor = float(b.double().norm()), FLOOR * typical * sqrt(b.numel())
        difference = float((found[name].double() - b.double()).norm())
        worst.update(difference / max(size, floor), f"step {step}, {name}")
        if size > floor:
            moved.add(name)
    return moved


def verify(
    config: Config, world: int, steps: int, tolerance: float, dtype: str = "float32", against: str | None = None
) -> EqualityReport:
    """Prove that `config` on `world` processes equals one process over `steps` steps, of the engine `against`."""
    config = spawn.resolve_device(config, world, "verify")
    one = reference(config, against)
    machine.demand(one, 1, "verify")
    expected = trace(one, 1, steps, dtype)
    return compare(trace(config, world, steps, dtype), expected, world, tolerance)
