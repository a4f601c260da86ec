"""Records chosen steps of a training run on every rank; rank 0 gets summaries.

recorder = Recorder(config, mesh, run_dir, resumed=0)
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
from moesys.measure.explain.averages import of_run
from moesys.measure.explain.explanation import Explanation
from moesys.measure.explain.layer_sums import order
from moesys.measure.explain.step_summary import Summary
from moesys.measure.record.gather import Gathered, Held, gather_steps
from moesys.measure.record.purpose import purpose_of, purposes
from moesys.measure.record.step_files import append, forget_after, rank_file, recorded, sample, summary_file
from moesys.measure.record.torch_collectives import watched
from moesys.measure.record.world import Gloo
from moesys.measure.step import Purpose, Travel
from moesys.parallel import comm, nodes
from moesys.parallel.comm import Time
from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import Ranks
from moesys.words import plural

HELD = 16
"""Recorded steps that ranks hold before they are gathered together."""


@dataclass
class Recording:
    """A step on this rank, while it is recorded; times on this rank's clock."""

    number: int
    begin: float = 0.0
    end: float = 0.0
    anchor: torch.cuda.Event | None = None
    """An event of the GPU at `begin`: its other events are read as seconds after it."""
    events: list[comm.CollectiveRecord] = field(default_factory=list)

    def at(self, time: Time) -> float:
        """`time` on the host's clock."""
        return time if isinstance(time, float) else self.begin + comm.between(self.anchor or time, time)


class Recorder:
    """What `config.measure` asks for. Collective over the world.

    Every rank keeps its own travels, of many ranks a sample (`recorded.sample`), and rank 0 the summaries. Records of
    steps after `resumed`, left by a run that ended after its last checkpoint, are removed.
    """

    def __init__(self, config: Config, mesh: Ranks, run_dir: Path, resumed: int):
        self.config, self.mesh, self.run_dir = config, mesh, run_dir
        self._purposes = purposes(mesh)
        self._layers = [f"layers.{i}" for i in range(config.model.layers) if config.model.is_moe(i)]
        self._held: list[Held] = []
        self._loads: dict[int, dict[str, list[float]]] = {}
        self.active = bool(config.measure.every or config.measure.steps)
        if not self.active:
            return
        # Times and names are gathered on the host, where the world's own group may be of GPUs.
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        assert group is not None
        self._peers = Gloo(group)
        self._sample = sample(self._peers.world)
        forget_after(run_dir, resumed, mesh.rank, self._peers.world)

    def due(self, number: int) -> bool:
        """Whether step `number` is recorded."""
        m = self.config.measure
        return number in m.steps or (m.every > 0 and number % m.every == 0)

    @contextmanager
    def step(self, number: int) -> Iterator[Recording | None]:
        """Record what travels inside, if the step is due: None if it is not."""
        if not self.due(number):
            yield None
            return
        functional, audit = not self.config.train.compile, self.config.measure.audit
        with recorded_step(number, self.mesh.device, functional, audit) as recording:
            yield recording

    def keep(self, recording: Recording | None, load: list[list[float]] | None) -> list[Summary]:
        """Hold what was recorded; every so often bring it together: the steps on rank 0, else none."""
        if recording is None:
            return []
        self._held.append(
            Held(recording.number, recording.begin, recording.end, list(travels(recording, self._purposes)))
        )
        if self.mesh.rank == 0:
            self._loads[recording.number] = dict(zip(self._layers, load or [], strict=False))
        return self.flush() if len(self._held) == HELD else []

    def flush(self) -> list[Summary]:
        """Write what ranks hold to the run's folder. Collective; returns the steps' summaries on rank 0, else none."""
        if not self._held:
            return []
        held, self._held = self._held, []
        peers, audit, layout = self._peers, self.config.measure.audit, layout_of(self.config, self.mesh.degrees)
        host = nodes.here(peers.rank, peers.world, self.config.cluster)
        keys = sorted(itertools.product(self._layers, ("dispatch", "combine"), (False, True)), key=order)
        gathered = gather_steps(held, peers, host, keys, self._loads, self._sample, audit, layout)
        self._loads = {}
        write(self.run_dir, held, gathered, peers.rank, self._sample, layout, audit)
        return gathered.summaries

    def explanation(self) -> Explanation | None:
        """The explanation of the run's recorded steps, on rank 0; None if there are none, or elsewhere."""
        return of_run(recorded(self.run_dir)) if self.mesh.rank == 0 else None


@contextmanager
def recorded_step(
    number: int, device: torch.device, functional: bool = True, audit: bool = False
) -> Iterator[Recording]:
    """Record all collectives inside as step `number`; see `watched` and `comm.record`."""
    recording = Recording(number)
    with watched(functional), comm.record(audit) as recording.events:
        _synchronise(device)  # so that nothing of the step before runs on the device when this one begins
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


def travels(recording: Recording, groups: Mapping[str, tuple[Purpose, ...]]) -> Iterator[Travel]:
    """The collectives of a recorded step; `groups`: the purposes that process groups serve, by name."""
    numbers: Counter[tuple[Any, ...]] = Counter()
    for event in recording.events:
        purpose = purpose_of(event, groups)
        message = event.kind if event.kind in ("send", "recv") else ""
        key = (purpose, event.ranks, message)
        numbers[key] += 1
        tag = event.tag
        yield Travel(
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
    held: Sequence[Held],
    gathered: Gathered,
    rank: int,
    sampled: Sequence[int],
    layout: str,
    audit: bool = False,
) -> None:
    """Add gathered steps to a run's folder: this rank's travels if it is `sampled`, and summaries if it has them."""
    if rank in sampled:
        for h, r in zip(held, gathered.mine, strict=True):
            append(rank_file(run_dir, rank), h.number, r, layout, audit)
    if gathered.summaries:
        with summary_file(run_dir).open("a") as file:
            file.write("".join(s.to_json() + "\n" for s in gathered.summaries))


def layout_of(config: Config, degrees: Degrees) -> str:
    """The layout that decides how long a step's communication takes, in words: steps of one layout can be averaged."""
    p, t = config.parallel, config.train
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")
    parts = [f"{axis} {size}" for axis in axes if (size := getattr(degrees, axis)) > 1]
    if degrees.ep * degrees.etp > 1:
        parts.append(f"{p.dispatch.kind} dispatch in {plural(p.dispatch.chunks, 'chunk')}")
    parts.append(f"{t.global_batch} × {t.seq_len} tokens in micro-batches of {t.micro_batch}")
    return f"{plural(degrees.world, 'rank')} ({', '.join(parts)})"
