"""What the benchmark of collectives finds, as nccl-tests defines and writes it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, pstdev
from typing import Any

from moesys.measure.explain.link_load import limits

FACTORS = {"all_reduce": 2.0, "send_recv": 0.0}
"""busbw = algbw · f · (n−1)/n: f where it is not 1; 0 stands for no factor at all."""


@dataclass(frozen=True)
class RankTimes:
    """The times of one rank: (begin, end) of every iteration in seconds on one clock (on GPUs from 0, where all streams
    met), and of the plain loop before and after each; and how many elements were wrong."""

    own: list[tuple[float, float]]
    plain: list[tuple[float, float]]
    wrong: int


@dataclass(frozen=True)
class CollectiveResult:
    """One collective of one size on groups of one kind.

    Attributes:
        bytes: S of nccl-tests, behind both bandwidths: what a rank sends in all, its own part included (the
            gathered size of all-gather and reduce-scatter); of uneven traffic the most of any rank's sent or
            received.
        times: seconds of each iteration: the slowest rank's.
        transfers: of each iteration, from the last begin of a group to its last end; the slowest group's.
        waits, medians: per rank, median over iterations of its wait and of its whole time. On GPUs streams meet before
            each iteration, so that no wait is told: all are 0.
        limit: bytes that limit an all-to-all on its links: of a node where `crosses` them, else of a rank.
        plain: median seconds of the plain loop, the slowest rank's; None if there was none.
        noise: by how much, of 1, that median differs between the passes before and after each iteration.
        wrong: elements with a wrong value, on all ranks.
        also: other names of the same groups ("intra", "expert" and "world" on one node are one).
    """

    kind: str
    group: str
    ranks: int
    bytes: int
    dtype: str
    count: int
    times: list[float]
    transfers: list[float]
    waits: list[float]
    medians: list[float]
    limit: float
    plain: float | None
    noise: float | None
    wrong: int
    also: tuple[str, ...] = ()

    @property
    def names(self) -> str:
        """All names of its groups: "intra = expert = world"."""
        return " = ".join((self.group, *self.also))

    @classmethod
    def of(
        cls,
        kind: str,
        group: str,
        groups: Sequence[Sequence[int]],
        size: int,
        dtype: str,
        grain: int,
        sent: Sequence[Sequence[int]],
        samples: Sequence[RankTimes],
        also: Sequence[str] = (),
    ) -> CollectiveResult:
        """From what all ranks saw; `sent` is the byte matrix of a group."""
        n, iterations = len(groups[0]), range(len(samples[0].own))
        arrived = [{r: max(samples[r].own[i][0] for r in g) for g in groups for r in g} for i in iterations]
        own = [s.own for s in samples]
        plain = slowest([s.plain for s in samples])
        most = max(*map(sum, sent), *map(sum, zip(*sent, strict=True)))
        bytes_ = most if kind.startswith("all_to_all") or kind == "send_recv" else size // n // grain * grain * n
        return cls(
            kind=kind,
            group=group,
            ranks=n,
            bytes=bytes_,
            dtype=dtype,
            count=bytes_ // grain // (n if kind in ("all_to_all", "all_gather", "reduce_scatter") else 1),
            times=slowest(own),
            transfers=[max(own[r][i][1] - arrived[i][r] for r in arrived[i]) for i in iterations],
            waits=[median(arrived[i][r] - s[i][0] for i in iterations) for r, s in enumerate(own)],
            medians=[median(end - begin for begin, end in s) for s in own],
            limit=_limit(group, groups, sent),
            plain=median(plain) if plain else None,
            noise=abs(median(plain[::2]) / median(plain[1::2]) - 1) if plain else None,
            wrong=sum(s.wrong for s in samples),
            also=tuple(also),
        )

    @classmethod
    def dispatch(
        cls,
        kind: str,
        groups: Sequence[Sequence[int]],
        dtype: str,
        sent: Sequence[Sequence[int]],
        samples: Sequence[RankTimes],
        limit: tuple[float, float],
    ) -> CollectiveResult:
        """Of a dispatcher, from what all ranks saw and sent; `limit` as `links.limits`."""
        size = max(map(sum, sent))
        found = cls.of(f"dispatch {kind}", "expert", groups, size, dtype, 1, sent, samples)
        return replace(found, bytes=size, count=size, limit=limit[1] or limit[0])

    @property
    def seconds(self) -> float:
        """Median over iterations."""
        return median(self.times)

    @property
    def transfer(self) -> float:
        """Median over iterations."""
        return median(self.transfers)

    @property
    def algbw(self) -> float:
        """Bytes per second: `bytes` / `seconds`."""
        return self.bytes / self.seconds

    @property
    def busbw(self) -> float:
        """algbw times what each link carries of a rank's bytes: (n−1)/n, all-reduce twice that."""
        factor = FACTORS.get(self.kind, 1.0) * (self.ranks - 1) / self.ranks
        return self.algbw * (factor or 1.0)

    @property
    def straggler(self) -> tuple[int, float] | None:
        """The rank that others wait for, and how long: the one that itself waits least; None if nobody waits."""
        last = min(range(len(self.waits)), key=lambda rank: self.waits[rank])
        waited = max(self.waits)
        return (last, waited) if waited > 0.1 * self.seconds else None

    def as_json(self) -> dict[str, Any]:
        """One of nccl-tests' `results`, with our own keys after theirs. Microseconds and 10⁹ bytes per second."""
        micro = [t * 1e6 for t in self.times]
        mean, spread = fmean(micro), pstdev(micro)
        ranked = sorted(micro)
        return {
            "size": self.bytes,
            "count": self.count,
            "type": self.dtype,
            "redop": "sum" if self.kind in ("all_reduce", "reduce_scatter") else "none",
            "root": -1,
            "out_of_place": {
                "time": self.seconds * 1e6,
                "alg_bw": self.algbw / 1e9,
                "bus_bw": self.busbw / 1e9,
                "nwrong": self.wrong,
            },
            "in_place": None,
            "out_of_place_per_iter": {
                "skipped_iterations": 0,
                "min_us": ranked[0],
                "max_us": ranked[-1],
                "avg_us": mean,
                "p50_us": median(micro),
                "p95_us": percentile(ranked, 0.95),
                "p99_us": percentile(ranked, 0.99),
                "stdev_us": spread,
                "cv_pct": 100 * spread / mean,
                "times_us": micro,
            },
            "collective": self.kind,
            "group": self.group,
            "also": list(self.also),
            "ranks": self.ranks,
            "transfer_us": self.transfer * 1e6,
            "wait_us": fmean(self.waits) * 1e6,
            "wait_share": fmean(self.waits) / fmean(self.medians),
            "rank_us": [t * 1e6 for t in self.medians],
            "rank_wait_us": [t * 1e6 for t in self.waits],
            "limiting_bytes": self.limit,
            "plain_us": None if self.plain is None else self.plain * 1e6,
            "plain_noise": self.noise,
        }


def slowest(stamps: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """Of every iteration, the longest time of any rank."""
    return [max(end - begin for begin, end in row) for row in zip(*stamps, strict=True)]


def percentile(ranked: Sequence[float], share: float) -> float:
    """Of sorted values, the nearest rank."""
    return ranked[min(len(ranked) - 1, round(share * (len(ranked) - 1)))]


def _limit(group: str, groups: Sequence[Sequence[int]], sent: Sequence[Sequence[int]]) -> float:
    """Bytes of the busiest rank to others, or, between nodes, of a node: all groups use its link at once."""
    inside, _ = limits(sent, [0] * len(sent))
    return inside * len(groups) if group == "inter" else inside
