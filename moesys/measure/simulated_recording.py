"""What bringing recorded steps together costs rank 0 of many ranks: the others are played, the work is done.

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
from moesys.measure.explain.averages import explain, of_run
from moesys.measure.explain.layer_sums import order
from moesys.measure.record.gather import ANSWER, HEAD, Held, gather_steps
from moesys.measure.record.recorder import HELD, write
from moesys.measure.record.step_files import recorded, sample, summary_file
from moesys.measure.record.world import Table, Words
from moesys.measure.report.run import write as write_report
from moesys.measure.step import Travel
from moesys.words import plural


@dataclass(frozen=True)
class Load:
    """What is simulated: steps of `world` ranks with so many MoE layers, whose experts `group` neighbours share."""

    world: int
    layers: int
    steps: int
    group: int
    node: int = 8

    @property
    def keys(self) -> list[tuple[str, str, bool]]:
        """The legs of its layers, in order."""
        legs = [(f"layers.{i}", part, back) for i in range(self.layers) for part in WAYS for back in (False, True)]
        return sorted(legs, key=order)

    def travels(self, step: int) -> Iterator[Travel]:
        """Those of rank 0: counts, rows and weights of every layer, there and back, gathered weights, and a sum."""
        draw = np.random.default_rng(step)
        experts, data = tuple(range(self.group)), tuple(range(0, self.world, self.group))
        at = number = gathered = 0.0
        for layer in (*range(self.layers), *reversed(range(self.layers))):
            back = number >= 4 * self.layers
            t = self._travel(at, data, gathered, "all_gather", "data", draw)
            yield t
            gathered, at = gathered + 1, t.end + 1e-4
            for part in WAYS if not back else WAYS[::-1]:
                kinds = ("all_to_all_counts", "all_to_all", "all_to_all_weights") if part == "dispatch" else ROWS
                for kind in kinds:
                    t = self._travel(at, experts, number, kind, "expert", draw)
                    yield replace(t, layer=f"layers.{layer}", part=part, backward=back, level="flat")
                    number, at = number + 1, t.end + 1e-4
        yield self._travel(at, tuple(range(self.world)), 0, "all_reduce", "step", draw)

    def _travel(
        self, at: float, ranks: tuple[int, ...], number: float, kind: str, purpose: str, draw: np.random.Generator
    ) -> Travel:
        sent = tuple(draw.integers(1, 2**20, len(ranks)).tolist()) if purpose == "expert" else ()
        size = sum(sent) if sent else 2**20
        end = at + float(draw.uniform(1e-4, 1e-3))
        return Travel(kind, purpose, ranks, int(number), at, at, end, size, sent)  # type: ignore[arg-type]


WAYS = ("dispatch", "combine")
ROWS = ("all_to_all",)


class Played:
    """`Peers` of rank 0, of which the others record what it does, a little earlier or later.

    read: bytes that rank 0 was given, by the collective that gave them. seconds: of CPU that playing took.
    """

    rank = 0

    def __init__(self, load: Load):
        self.world, self.load, self.read = load.world, load, dict.fromkeys(("exchange", "rows"), 0)
        self.seconds = 0.0
        self._asked: list[Words] | None = None
        self._draw = np.random.default_rng(0)

    def clock(self) -> float:
        return 0.0

    def names(self, name: str) -> list[str]:
        return [f"node-{rank // self.load.node}" for rank in range(self.world)]

    def first(self, x: Table) -> Table:
        return x

    def exchange(self, words: list[Words]) -> list[Words]:
        """First what is asked of this rank, by all members of the groups of what it asks itself; then answers."""
        begin = process_time()
        if self._asked is None:
            self._asked = words
            come = self._questions(words[0])
        else:
            come = [self._answers(asked) for asked in self._asked]
            come[0], self._asked = words[0], None
        self.read["exchange"] += sum(w.nbytes for w in come)
        self.seconds += process_time() - begin
        return come

    def _questions(self, mine: Words) -> list[Words]:
        come: list[list[Words]] = [[] for _ in range(self.world)]
        at = 0
        while at < len(mine):
            size = HEAD + int(mine[at + 5])
            record, at = mine[at : at + size], at + size
            for rank in self._group(record):
                other = record.copy()
                other[6:9] = (record[6:9].view(np.float64) + self._draw.uniform(-1e-4, 1e-4)).view(np.int64)
                come[rank].append(other if rank else record)
        return [np.concatenate(words) if words else np.empty(0, np.int64) for words in come]

    def _group(self, record: Words) -> range:
        """The ranks of a collective: of all, of experts, or with other data."""
        if record[5]:
            return range(self.load.group)
        return range(self.world) if record[2] // 2 else range(0, self.world, self.load.group)

    def _answers(self, asked: Words) -> Words:
        answers, at = [], 0
        while at < len(asked):
            begin = asked[at + 6 : at + 7].view(np.float64)[0]
            facts = np.array([begin + self._draw.uniform(0, 1e-3), np.nan, 0.9, np.nan])
            told = np.array([int(self._draw.integers(self.world)), 1, int(asked[at + 4])], np.int64)
            answers.append(np.concatenate([told, facts.view(np.int64)]))
            at += HEAD + int(asked[at + 5])
        found = np.concatenate(answers) if answers else np.empty(0, np.int64)
        assert len(found) % ANSWER == 0
        return found

    def total(self, x: Table) -> Table:
        return x * self.world

    def highest(self, x: Table) -> Table:
        return x

    def rows(self, x: Table) -> Table:
        found = np.broadcast_to(x, (self.world, *x.shape))
        self.read["rows"] += found.nbytes
        return found


@dataclass(frozen=True)
class Result:
    """What it cost rank 0.

    Attributes:
        seconds: of CPU, from the recorded travels to the report.
        peak_bytes: most memory that this process had, all its libraries included.
        read: bytes that other ranks gave it.
        written: bytes of the summaries.
        travels: of one rank in all steps; `records`: of all ranks.
    """

    world: int
    layers: int
    steps: int
    seconds: float
    peak_bytes: int
    read: int
    written: int
    travels: int
    records: int
    machine: str
    date: str

    def lines(self) -> list[str]:
        what = f"{plural(self.world, 'rank')}, {plural(self.layers, 'layer')}, {plural(self.steps, 'recorded step')}"
        return [
            f"{self.machine}, {self.date}: {what} ({self.records:,} travels of all ranks)",
            f"  rank 0: {self.seconds:.1f} s of CPU from its records to the report, {self.peak_bytes / 2**20:.0f} MiB "
            "at most, libraries included",
            f"  rank 0 was told {self.read / 2**20:.1f} MiB by others, and wrote {self.written / 2**20:.1f} MiB of "
            "summaries",
            "  the network is not in it: the other ranks are played",
        ]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def run(load: Load) -> Result:
    """Record, sum up, write, explain and report as rank 0 of `load.world` does."""
    with temporary("simulated-", None) as folder:
        return measured(load, folder)


def measured(load: Load, run_dir: Path, pictures: bool = True) -> Result:
    """The same in a folder; `pictures`: with the report."""
    everything = [list(load.travels(number)) for number in range(load.steps)]
    gc.collect()
    begin, played, done = process_time(), Played(load), 0
    (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(load.steps)))
    while done < load.steps:
        held = [Held(n, 0.0, ts[-1].end + 1e-3, ts) for n, ts in enumerate(everything[done : done + HELD], done)]
        _flush(held, played, load, run_dir)
        done += len(held)
    found = of_run(recorded(run_dir))
    assert found is not None
    if pictures:
        write_report(run_dir)
    seconds, travels = process_time() - begin - played.seconds, sum(map(len, everything))
    return Result(
        load.world, load.layers, load.steps, seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        read=sum(played.read.values()),
        written=summary_file(run_dir).stat().st_size,
        travels=travels,
        records=travels * load.world,
        machine=f"{platform.machine()}, numpy {np.__version__}",
        date=date.today().isoformat(),
    )  # fmt: skip


def _flush(held: Sequence[Held], played: Played, load: Load, run_dir: Path) -> None:
    """As the recorder does, and the metrics of each step."""
    sampled, layout = sample(load.world), f"{load.world} ranks"
    gathered = gather_steps(held, played, "node-0", load.keys, {}, sampled, layout=layout)
    write(run_dir, held, gathered, played.rank, sampled, layout)
    for summary in gathered.summaries:
        explain([summary])
