"""Records chosen steps of a training run on every rank; rank 0 gets summaries.

recorder = StepRecorder(config, mesh, run_dir, resumed=0)
with recorder.step(trainer.step + 1) as recording:
    ...                      # a step
recorder.keep(recording, load)
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.measure.explain.averages import explain_run
from moesys.measure.explain.explanation import Explanation
from moesys.measure.explain.layer_sums import order
from moesys.measure.explain.step_summary import Summary
from moesys.measure.record.gather import GatheredSteps, LocalStep, gather_steps
from moesys.measure.record.purpose import purpose_of, purposes
from moesys.measure.record.step_files import append, forget_after, rank_file, recorded, sample, summary_file
from moesys.measure.record.torch_collectives import record_torch_collectives
from moesys.measure.record.world import GlooWorld
from moesys.measure.step import CollectiveSpan, Purpose
from moesys.parallel import comm, nodes
from moesys.parallel.comm import Time
from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import Ranks
from moesys.words import plural

GATHER_EVERY = 16
"""Recorded steps that ranks keep in memory before they gather them."""


@dataclass
class Recording:
    """A step on this rank while it is recorded. Times are on this rank's clock.

    Attributes:
        anchor: an event of the GPU at `begin`; its other events are read as seconds after it.
    """

    number: int
    begin: float = 0.0
    end: float = 0.0
    anchor: torch.cuda.Event | None = None
    events: list[comm.CollectiveRecord] = field(default_factory=list)

    def at(self, time: Time) -> float:
        """`time` on the host's clock."""
        return time if isinstance(time, float) else self.begin + comm.between(self.anchor or time, time)


class StepRecorder:
    """Records the steps that `config.measure` names. Collective over the world.

    Every rank keeps its own collectives (a sample of ranks where there are many: `step_files.sample`). Rank 0 keeps
    the summaries. Records of steps after `resumed` are removed: a run that ended after its last checkpoint left them.
    """

    def __init__(self, config: Config, mesh: Ranks, run_dir: Path, resumed: int):
        self.config, self.mesh, self.run_dir = config, mesh, run_dir
        self._purposes = purposes(mesh)
        self._layers = [f"layers.{i}" for i in config.model.moe_blocks]
        self._local: list[LocalStep] = []
        self._loads: dict[int, dict[str, list[float]]] = {}
        self.active = bool(config.measure.every or config.measure.steps)
        if not self.active:
            return
        # Times and names are gathered on the host; the world's own group may be of GPUs.
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        assert group is not None
        self._world = GlooWorld(group)
        self._sample = sample(self._world.size)
        forget_after(run_dir, resumed, mesh.rank, self._world.size)

    def due(self, number: int) -> bool:
        """Whether step `number` is recorded."""
        m = self.config.measure
        return number in m.steps or (m.every > 0 and number % m.every == 0)

    @contextmanager
    def step(self, number: int) -> Iterator[Recording | None]:
        """Record the collectives inside if step `number` is due; yields None if it is not."""
        if not self.due(number):
            yield None
            return
        m = self.config.measure
        with recorded_step(number, self.mesh.device, not self.config.train.compile, m.audit) as recording:
            yield recording

    def keep(self, recording: Recording | None, load: list[list[float]] | None) -> list[Summary]:
        """Keep a recorded step; `flush` after every `GATHER_EVERY` of them. Returns as `flush` does."""
        if recording is None:
            return []
        spans = list(spans_of(recording, self._purposes))
        self._local.append(LocalStep(recording.number, recording.begin, recording.end, spans))
        if self.mesh.rank == 0:
            self._loads[recording.number] = dict(zip(self._layers, load or [], strict=False))
        return self.flush() if len(self._local) == GATHER_EVERY else []

    def flush(self) -> list[Summary]:
        """Write the kept steps to the run's folder. Collective; returns their summaries on rank 0, else none."""
        if not self._local:
            return []
        local, self._local = self._local, []
        world, audit, layout = self._world, self.config.measure.audit, layout_of(self.config, self.mesh.degrees)
        host = nodes.here(world.rank, world.size, self.config.cluster)
        keys = sorted(itertools.product(self._layers, ("dispatch", "combine"), (False, True)), key=order)
        gathered = gather_steps(local, world, host, keys, self._loads, self._sample, audit, layout)
        self._loads = {}
        write(self.run_dir, local, gathered, world.rank, self._sample, layout, audit)
        return gathered.summaries

    def explanation(self) -> Explanation | None:
        """The explanation of the run's recorded steps, on rank 0; None without such steps, and on other ranks."""
        return explain_run(recorded(self.run_dir)) if self.mesh.rank == 0 else None


@contextmanager
def recorded_step(
    number: int, device: torch.device, functional: bool = True, audit: bool = False
) -> Iterator[Recording]:
    """Record all collectives inside as step `number`; see `record_torch_collectives` and `comm.record`."""
    recording = Recording(number)
    with record_torch_collectives(functional), comm.record(audit) as recording.events:
        _synchronise(device)  # the step before must not run on the device when this one begins
        if device.type == "cuda":
            recording.anchor = torch.cuda.Event(enable_timing=True)
            recording.anchor.record()
        recording.begin = perf_counter()
        yield recording
        _synchronise(device)
        recording.end = perf_counter()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spans_of(recording: Recording, groups: Mapping[str, tuple[Purpose, ...]]) -> Iterator[CollectiveSpan]:
    """The collectives of a recorded step; `groups`: the purposes that process groups serve, by name."""
    numbers: Counter[tuple[Any, ...]] = Counter()
    for event in recording.events:
        purpose = purpose_of(event, groups)
        message = event.kind if event.kind in ("send", "recv") else ""
        key = (purpose, event.ranks, message)
        numbers[key] += 1
        tag = event.tag
        yield CollectiveSpan(
            kind=event.kind,
            purpose=purpose,
            ranks=event.ranks,
            number=numbers[key] - 1,
            begin=recording.at(event.begin),
            waited=recording.at(event.waited),
            end=recording.at(event.end),
            bytes=event.bytes,
            sent=event.sent,
            layer=tag.layer,
            part=tag.part,
            backward=tag.backward,
            level=tag.level,
            met=None if event.met is None else recording.at(event.met),
        )


def write(
    run_dir: Path,
    local: Sequence[LocalStep],
    gathered: GatheredSteps,
    rank: int,
    sampled: Sequence[int],
    layout: str,
    audit: bool = False,
) -> None:
    """Add gathered steps to a run's folder: this rank's collectives if it is `sampled`, and summaries on rank 0."""
    if rank in sampled:
        for step, own in zip(local, gathered.own, strict=True):
            append(rank_file(run_dir, rank), step.number, own, layout, audit)
    if gathered.summaries:
        with summary_file(run_dir).open("a") as file:
            file.write("".join(s.to_json() + "\n" for s in gathered.summaries))


def layout_of(config: Config, degrees: Degrees) -> str:
    """Degrees of parallelism and batch sizes in words. Steps of one layout can be averaged."""
    p, t = config.parallel, config.train
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")
    parts = [f"{axis} {size}" for axis in axes if (size := getattr(degrees, axis)) > 1]
    if degrees.ep * degrees.etp > 1:
        parts.append(f"{p.dispatch.kind} dispatch in {plural(p.dispatch.chunks, 'chunk')}")
    parts.append(f"{t.global_batch} × {t.seq_len} tokens in micro-batches of {t.micro_batch}")
    return f"{plural(degrees.world, 'rank')} ({', '.join(parts)})"
