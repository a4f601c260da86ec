"""Records chosen steps of a training run on every rank, and brings them together on rank 0.

recorder = Recorder(config, mesh, run_dir, resumed=0)
with recorder.step(trainer.step + 1) as recording:
    ...                      # a step
recorder.keep(recording, load)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.files import write_whole
from moesys.measure import clocks
from moesys.measure.explain import of_run
from moesys.measure.explanation import Explanation
from moesys.measure.purposes import purpose_of, purposes
from moesys.measure.step import RankStep, Step, Travel, read_steps, steps_file
from moesys.measure.watch import watched
from moesys.parallel import comm, nodes
from moesys.parallel.comm import Time
from moesys.parallel.degrees import Degrees
from moesys.parallel.mesh import Ranks
from moesys.words import plural

HELD = 16
"""Recorded steps that ranks hold before they are brought together."""


@dataclass
class Recording:
    """A step on this rank, while it is recorded; times on this rank's clock."""

    number: int
    begin: float = 0.0
    end: float = 0.0
    anchor: torch.cuda.Event | None = None
    """An event of the GPU at `begin`: its other events are read as seconds after it."""
    events: list[comm.Event] = field(default_factory=list)

    def at(self, time: Time) -> float:
        """`time` on the host's clock."""
        return time if isinstance(time, float) else self.begin + comm.between(self.anchor or time, time)


@dataclass
class _Held:
    """A recorded step of this rank on its own clock."""

    number: int
    begin: float
    end: float
    travels: list[Travel]


class Recorder:
    """What `config.measure` asks for. Collective over the world.

    Records of steps after `resumed`, left by a run that ended after its last checkpoint, are removed.
    """

    def __init__(self, config: Config, mesh: Ranks, run_dir: Path, resumed: int):
        self.config, self.mesh = config, mesh
        self.path = steps_file(run_dir)
        self._purposes = purposes(mesh)
        self._layers = [f"layers.{i}" for i in range(config.model.layers) if config.model.is_moe(i)]
        self._held: list[_Held] = []
        self._loads: dict[int, dict[str, list[float]]] = {}
        self._group: dist.ProcessGroup | None = None
        self.active = bool(config.measure.every or config.measure.steps)
        if not self.active:
            return
        # Times and names are gathered on the host, where the world's own group may be of GPUs.
        on_host = dist.get_backend() == "gloo"
        self._group = dist.group.WORLD if on_host else dist.new_group(backend="gloo")
        if mesh.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [step for step in read_steps(run_dir) if step.number <= resumed]
            write_whole(self.path, "".join(step.to_json() + "\n" for step in kept))

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
        recording = Recording(number)
        with watched(not self.config.train.compile), comm.record(self.config.measure.audit) as recording.events:
            if self.mesh.device.type == "cuda":
                # Nothing runs on the device now: the step before ended with a synchronisation.
                recording.anchor = torch.cuda.Event(enable_timing=True)
                recording.anchor.record()
            recording.begin = perf_counter()
            yield recording
            recording.end = perf_counter()

    def keep(self, recording: Recording | None, load: list[list[float]] | None) -> list[Step]:
        """Hold what was recorded; every so often bring it together: the steps on rank 0, else none."""
        if recording is None:
            return []
        self._held.append(_Held(recording.number, recording.begin, recording.end, list(self._travels(recording))))
        self._loads[recording.number] = dict(zip(self._layers, load or [], strict=False))
        return self.flush() if len(self._held) == HELD else []

    def flush(self) -> list[Step]:
        """Write what all ranks hold to the run's folder. Collective; returns these steps on rank 0, else none."""
        if not self._held or self._group is None:
            return []
        rank, world = dist.get_rank(), dist.get_world_size()
        host = nodes.here(rank, world, self.config.cluster)
        told = {"host": host, "offset": clocks.offset(self._group), "steps": self._held}
        everyone: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(told, everyone, group=self._group)
        self._held = []
        if everyone is None:
            return []
        steps = [self._joined(everyone, i) for i in range(len(everyone[0]["steps"]))]
        with self.path.open("a") as file:
            file.write("".join(step.to_json() + "\n" for step in steps))
        return steps

    def explanation(self) -> Explanation | None:
        """The explanation of the run's recorded steps, on rank 0; None if there are none."""
        return of_run(read_steps(self.path.parent.parent))

    def _travels(self, recording: Recording) -> Iterator[Travel]:
        numbers: Counter[tuple[Any, ...]] = Counter()
        for event in recording.events:
            purpose = purpose_of(event, self._purposes)
            message = event.kind if event.kind in ("send", "recv") else ""
            key = (purpose, event.ranks, message)
            numbers[key] += 1
            way = event.way
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
                layer=way.layer,
                part=way.part,
                backward=way.backward,
                level=way.level,
                met=None if event.met is None else recording.at(event.met),
            )

    def _joined(self, everyone: list[Any], i: int) -> Step:
        """The i-th held step of all ranks, its times from rank 0's begin."""
        first: _Held = everyone[0]["steps"][i]
        start = first.begin + everyone[0]["offset"]
        parts = enumerate(everyone)
        ranks = tuple(_moved(p["steps"][i], rank, p["host"], p["offset"] - start) for rank, p in parts)
        load = self._loads.pop(first.number, {})
        return Step(first.number, ranks, load, self.config.measure.audit, layout_of(self.config, self.mesh.degrees))


def layout_of(config: Config, degrees: Degrees) -> str:
    """The layout that decides how long a step's communication takes, in words: steps of one layout can be averaged."""
    p, t = config.parallel, config.train
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")
    parts = [f"{axis} {size}" for axis in axes if (size := getattr(degrees, axis)) > 1]
    if degrees.ep * degrees.etp > 1:
        parts.append(f"{p.dispatch.kind} dispatch in {plural(p.dispatch.chunks, 'chunk')}")
    parts.append(f"{t.global_batch} × {t.seq_len} tokens in micro-batches of {t.micro_batch}")
    return f"{plural(degrees.world, 'rank')} ({', '.join(parts)})"


def _moved(held: _Held, rank: int, host: str, by: float) -> RankStep:
    """The step with all times later by so many seconds, in tenths of microseconds: short to write."""

    def at(time: float) -> float:
        return round(time + by, 7)

    travels = tuple(
        replace(t, begin=at(t.begin), waited=at(t.waited), end=at(t.end), met=None if t.met is None else at(t.met))
        for t in held.travels
    )
    return RankStep(rank, host, at(held.begin), at(held.end), travels)
