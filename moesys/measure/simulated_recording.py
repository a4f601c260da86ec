"""Measures what recorded steps of many ranks cost rank 0. The other ranks are simulated; rank 0's work is real.

moesys bench measure configs/quickstart.yaml --simulate 1024 model.layers=61
"""

from __future__ import annotations

import gc
import platform
import resource
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from time import process_time

import numpy as np

from moesys.leftovers import temporary
from moesys.measure.explain.averages import explain, explain_run
from moesys.measure.explain.layer_sums import order
from moesys.measure.record.arrival_exchange import ANSWER, HEAD
from moesys.measure.record.gather import LocalStep, gather_steps
from moesys.measure.record.recorder import GATHER_EVERY, write
from moesys.measure.record.step_files import recorded, sample, summary_file
from moesys.measure.record.world import Table, Words
from moesys.measure.report.run import write as write_report
from moesys.measure.step import CollectiveSpan
from moesys.words import plural

PARTS = ("dispatch", "combine")
KINDS = {"dispatch": ("all_to_all_counts", "all_to_all", "all_to_all_weights"), "combine": ("all_to_all",)}
"""The collectives of dispatch and of combine."""


@dataclass(frozen=True)
class SimulatedRun:
    """Recorded steps of a run that nobody ran.

    Attributes:
        world: ranks.
        layers: MoE layers.
        steps: recorded steps.
        group: neighbours that share the experts.
        node: ranks of a node.
    """

    world: int
    layers: int
    steps: int
    group: int
    node: int = 8

    @property
    def keys(self) -> list[tuple[str, str, bool]]:
        """The phases of its layers, in order."""
        phases = [(f"layers.{i}", part, back) for i in range(self.layers) for part in PARTS for back in (False, True)]
        return sorted(phases, key=order)

    def collectives(self, step: int) -> Iterator[CollectiveSpan]:
        """Rank 0's collectives: all-to-all and gathered weights of every layer, forward and backward, and a sum."""
        draw = np.random.default_rng(step)
        experts, data = tuple(range(self.group)), tuple(range(0, self.world, self.group))
        at = number = gathered = 0.0
        for layer in (*range(self.layers), *reversed(range(self.layers))):
            back = number >= 4 * self.layers
            t = self._span(at, data, gathered, "all_gather", "data", draw)
            yield t
            gathered, at = gathered + 1, t.end + 1e-4
            for part in PARTS if not back else PARTS[::-1]:
                for kind in KINDS[part]:
                    t = self._span(at, experts, number, kind, "expert", draw)
                    yield replace(t, layer=f"layers.{layer}", part=part, backward=back, level="flat")
                    number, at = number + 1, t.end + 1e-4
        yield self._span(at, tuple(range(self.world)), 0, "all_reduce", "step", draw)

    def _span(
        self, at: float, ranks: tuple[int, ...], number: float, kind: str, purpose: str, draw: np.random.Generator
    ) -> CollectiveSpan:
        sent = tuple(draw.integers(1, 2**20, len(ranks)).tolist()) if purpose == "expert" else ()
        size = sum(sent) if sent else 2**20
        end = at + float(draw.uniform(1e-4, 1e-3))
        return CollectiveSpan(kind, purpose, ranks, int(number), at, at, end, size, sent)  # type: ignore[arg-type]


class SimulatedWorld:
    """`World` as rank 0 has it. The other ranks record what rank 0 records, a little earlier or later.

    Attributes:
        received: bytes that rank 0 got, by collective.
        seconds: CPU time of the simulation itself.
    """

    rank = 0

    def __init__(self, run: SimulatedRun):
        self.size, self.run, self.received = run.world, run, dict.fromkeys(("all_to_all", "gather"), 0)
        self.seconds = 0.0
        self._asked: list[Words] | None = None
        self._draw = np.random.default_rng(0)

    def clock_offset(self) -> float:
        """0: rank 0's own clock."""
        return 0.0

    def all_gather_names(self, name: str) -> list[str]:
        """The node of each rank."""
        return [f"node-{rank // self.run.node}" for rank in range(self.size)]

    def broadcast(self, x: Table) -> Table:
        """Rank 0's own table."""
        return x

    def all_to_all(self, words: list[Words]) -> list[Words]:
        """Questions in the first call of two, in which all members of rank 0's groups ask; then answers."""
        begin = process_time()
        if self._asked is None:
            self._asked = words
            arriving = self._questions(words[0])
        else:
            arriving = [self._answers(asked) for asked in self._asked]
            arriving[0], self._asked = words[0], None
        self.received["all_to_all"] += sum(w.nbytes for w in arriving)
        self.seconds += process_time() - begin
        return arriving

    def _questions(self, mine: Words) -> list[Words]:
        """The questions of all ranks to rank 0: copies of its own at other times."""
        arriving: list[list[Words]] = [[] for _ in range(self.size)]
        at = 0
        while at < len(mine):
            size = HEAD + int(mine[at + 5])
            record, at = mine[at : at + size], at + size
            for rank in self._group(record):
                other = record.copy()
                other[6:9] = (record[6:9].view(np.float64) + self._draw.uniform(-1e-4, 1e-4)).view(np.int64)
                arriving[rank].append(other if rank else record)
        return [np.concatenate(words) if words else np.empty(0, np.int64) for words in arriving]

    def _group(self, record: Words) -> range:
        """The ranks of a collective: those that share experts, all, or those with other data."""
        if record[5]:
            return range(self.run.group)
        return range(self.size) if record[2] // 2 else range(0, self.size, self.run.group)

    def _answers(self, asked: Words) -> Words:
        """The answers to rank 0's questions: another rank came last, up to a millisecond later."""
        answers, at = [], 0
        while at < len(asked):
            begin = asked[at + 6 : at + 7].view(np.float64)[0]
            times = np.array([begin + self._draw.uniform(0, 1e-3), np.nan, 0.9, np.nan])
            facts = np.array([int(self._draw.integers(self.size)), 1, int(asked[at + 4])], np.int64)
            answers.append(np.concatenate([facts, times.view(np.int64)]))
            at += HEAD + int(asked[at + 5])
        found = np.concatenate(answers) if answers else np.empty(0, np.int64)
        assert len(found) % ANSWER == 0
        return found

    def reduce_sum(self, x: Table) -> Table:
        """The sum over ranks that all have rank 0's table."""
        return x * self.size

    def all_reduce_max(self, x: Table) -> Table:
        """Rank 0's own table."""
        return x

    def gather(self, x: Table) -> Table:
        """Rank 0's table once for each rank."""
        found = np.broadcast_to(x, (self.size, *x.shape))
        self.received["gather"] += found.nbytes
        return found


@dataclass(frozen=True)
class SimulationResult:
    """The cost of recording for rank 0.

    Attributes:
        seconds: CPU time from the recorded collectives to the report.
        peak_bytes: most memory of this process, all its libraries included.
        read: bytes that other ranks sent.
        written: bytes of the summaries.
        collectives: of one rank in all steps.
        records: collectives of all ranks in all steps.
    """

    world: int
    layers: int
    steps: int
    seconds: float
    peak_bytes: int
    read: int
    written: int
    collectives: int
    records: int
    machine: str
    date: str

    def lines(self) -> list[str]:
        """The result as text."""
        what = f"{plural(self.world, 'rank')}, {plural(self.layers, 'layer')}, {plural(self.steps, 'recorded step')}"
        return [
            f"{self.machine}, {self.date}: {what} ({self.records:,} collectives of all ranks)",
            f"  rank 0: {self.seconds:.1f} s of CPU from its records to the report, {self.peak_bytes / 2**20:.0f} MiB "
            "at most, libraries included",
            f"  rank 0 received {self.read / 2**20:.1f} MiB from others, and wrote {self.written / 2**20:.1f} MiB of "
            "summaries",
            "  the other ranks are simulated: the network's time is not included",
        ]

    def as_json(self) -> dict[str, object]:
        """All figures."""
        return asdict(self)


def run(simulated: SimulatedRun) -> SimulationResult:
    """Record, sum up, write, explain and report as rank 0 of `simulated.world` ranks does."""
    with temporary("simulated-", None) as folder:
        return measured(simulated, folder)


def measured(simulated: SimulatedRun, run_dir: Path, pictures: bool = True) -> SimulationResult:
    """`run` in a given folder; without `pictures` there is no report."""
    spans = [list(simulated.collectives(number)) for number in range(simulated.steps)]
    gc.collect()
    begin, world, done = process_time(), SimulatedWorld(simulated), 0
    (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(simulated.steps)))
    while done < simulated.steps:
        some = enumerate(spans[done : done + GATHER_EVERY], done)
        local = [LocalStep(number, 0.0, mine[-1].end + 1e-3, mine) for number, mine in some]
        _flush(local, world, simulated, run_dir)
        done += len(local)
    found = explain_run(recorded(run_dir))
    assert found is not None
    if pictures:
        write_report(run_dir)
    seconds, collectives = process_time() - begin - world.seconds, sum(map(len, spans))
    return SimulationResult(
        simulated.world, simulated.layers, simulated.steps, seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        read=sum(world.received.values()),
        written=summary_file(run_dir).stat().st_size,
        collectives=collectives,
        records=collectives * simulated.world,
        machine=f"{platform.machine()}, numpy {np.__version__}",
        date=date.today().isoformat(),
    )  # fmt: skip


def _flush(local: Sequence[LocalStep], world: SimulatedWorld, simulated: SimulatedRun, run_dir: Path) -> None:
    """Gather and write steps as the recorder does, and explain each as metrics do."""
    sampled, layout = sample(simulated.world), f"{simulated.world} ranks"
    gathered = gather_steps(local, world, "node-0", simulated.keys, {}, sampled, layout=layout)
    write(run_dir, local, gathered, world.rank, sampled, layout)
    for summary in gathered.summaries:
        explain([summary])
