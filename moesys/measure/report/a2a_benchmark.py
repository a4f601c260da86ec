"""The report of `moesys bench a2a`, from the file of its --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moesys.measure.a2a_benchmark.result_file import ResultEntry, read
from moesys.measure.a2a_benchmark.sizes import human
from moesys.measure.predict.links import LinkModel
from moesys.measure.report.figures import bandwidths
from moesys.measure.report.page import figure, page, section, table

HEADS = ("bytes", "median µs", "min", "p95", "max", "wait", "transfer", "algbw GB/s", "busbw GB/s", "wrong")

NOTE = (
    "bytes: all bytes that a rank sends, its own part included. Times are those of the slowest rank. wait: until the "
    "last rank of a group began. Bandwidths are those of nccl-tests."
)


def page_of(path: Path) -> str:
    """The page for the file at `path`.

    Raises:
        FileError: --json did not write this file.
    """
    file = read(path)
    parts = [_section(results, file.lines) for results in _grouped(file.results).values()]
    facts = [(name, str(file.config.get(name))) for name in ("date", "ranks", "hosts", "backend", "device", "torch")]
    return page("collectives", [table((), facts, text=True), *parts, _links(file.lines)])


def _grouped(results: Sequence[ResultEntry]) -> dict[tuple[str, str, str], list[ResultEntry]]:
    found: dict[tuple[str, str, str], list[ResultEntry]] = {}
    for r in results:
        found.setdefault((r.collective, r.group, r.type), []).append(r)
    return found


def _section(results: list[ResultEntry], lines: Mapping[str, LinkModel]) -> str:
    rows = []
    for r in results:
        per, out = r.out_of_place_per_iter, r.out_of_place
        times = per.p50_us, per.min_us, per.p95_us, per.max_us, r.wait_us, r.transfer_us
        rates = f"{out.alg_bw:.3f}", f"{out.bus_bw:.3f}", str(out.nwrong)
        rows.append((human(r.size), *(f"{t:,.0f}" for t in times), *rates))
    first = results[0]
    name = f"{first.collective} {first.group}"
    parts = [table(HEADS, rows)]
    limited = first.collective in ("all_to_all", "send_recv")
    points = [(r.limiting_bytes if limited else r.size, r.transfer_us / 1e6) for r in results if r.transfer_us > 0]
    if name in lines and points:
        parts.append(figure(bandwidths("measured and fitted", {name: points}, {name: lines[name]})))
    return section(f"{first.collective}, {first.names} groups of {first.ranks}, {first.type}", *parts, note=NOTE)


def _links(lines: Mapping[str, LinkModel]) -> str:
    rows = [
        (name, f"{x.alpha * 1e6:,.1f}", f"{x.bandwidth / 1e9:.3f}", f"{x.error:.0%}", f"{x.worst:.0%}")
        for name, x in lines.items()
    ]
    heads = ("collective", "α µs", "β GB/s", "median error", "worst")
    return section("Links: seconds = α + bytes / β", table(heads, rows)) if rows else ""
