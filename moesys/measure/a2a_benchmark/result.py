"""A result of the benchmark, by nccl-tests' definitions. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, pstdev
from typing import Any

from moesys.measure.explain.link_load import limits

FACTORS = {"all_reduce": 2.0, "send_recv": 0.0}
"""busbw = algbw · f · (n−1)/n, with f if it is not 1. 0 stands for busbw = algbw."""


@dataclass(frozen=True)
class RankTimes:
    """The times of one rank.

    Attributes:
        own: (begin, end) of every iteration in seconds on one clock (on GPUs from 0, where all streams met).
        plain: the same for the bare loop before and after each iteration.
        wrong: number of wrong elements.
    """

    own: list[tuple[float, float]]
    plain: list[tuple[float, float]]
    wrong: int


@dataclass(frozen=True)
class CollectiveResult:
    """One collective of one size on groups of one kind.

    Attributes:
        bytes: S of nccl-tests, for both bandwidths: all bytes that a rank sends, its own part included (the gathered
            size
            for all-gather and reduce-scatter); with uneven traffic, most bytes that any rank sends or receives.
        times: seconds of each iteration on the slowest rank.
        transfers: seconds of each iteration from the last begin to the last end in a group; the slowest group's.
        waits, medians: medians over iterations of each rank's wait and time. Waits are 0 on GPUs, where streams meet
            first.
        limit: limiting bytes of an all-to-all: of a node between nodes, else of a rank.
        plain: median seconds of the bare loop on the slowest rank; None without one.
        noise: relative difference of that median between the passes before and after each iteration.
        wrong: number of wrong elements on all ranks.
        also: other names of the same groups ("intra", "expert" and "world" are one on a single node).
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
        """The result from the times of all ranks. `sent`: the byte matrix of a group."""
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
        """The result of a dispatcher, from the times and bytes of all ranks. `limit`: as `link_load.limits`."""
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
        """algbw times the part of a rank's bytes that each link carries: (n−1)/n, twice that for all-reduce."""
        factor = FACTORS.get(self.kind, 1.0) * (self.ranks - 1) / self.ranks
        return self.algbw * (factor or 1.0)

    @property
    def straggler(self) -> tuple[int, float] | None:
        """The rank that others wait for (it waits least itself), and the longest wait; None without waiting."""
        last = min(range(len(self.waits)), key=lambda rank: self.waits[rank])
        waited = max(self.waits)
        return (last, waited) if waited > 0.1 * self.seconds else None

    def as_json(self) -> dict[str, Any]:
        """One entry of nccl-tests' `results`, with our own keys after theirs. Microseconds and 10⁹ bytes per second."""
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
    """The longest time of any rank in each iteration."""
    return [max(end - begin for begin, end in row) for row in zip(*stamps, strict=True)]


def percentile(ranked: Sequence[float], share: float) -> float:
    """The nearest rank of sorted values."""
    return ranked[min(len(ranked) - 1, round(share * (len(ranked) - 1)))]


def _limit(group: str, groups: Sequence[Sequence[int]], sent: Sequence[Sequence[int]]) -> float:
    """Bytes of the busiest rank to others; between nodes those of a node, because all groups share its link."""
    inside, _ = limits(sent, [0] * len(sent))
    return inside * len(groups) if group == "inter" else inside
