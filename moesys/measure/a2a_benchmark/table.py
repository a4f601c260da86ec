"""Shows the benchmark's results on the terminal, and as the JSON of nccl-tests."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from datetime import date
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesys.measure.a2a_benchmark.fitted_links import flat, lines
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.result import CollectiveResult
from moesys.measure.a2a_benchmark.sizes import human
from moesys.measure.predict.links import LinkModel
from moesys.version import __version__
from moesys.words import plural

LARGER = "measure several sizes and larger ones, as --min 1K --max 64M"


def show(results: list[CollectiveResult], facts: dict[str, Any], console: Console) -> None:
    """Print a table for each collective and group, and the fitted links."""
    hosts = len(set(facts["hosts"]))
    console.print(
        f"{plural(facts['ranks'], 'rank')} on {plural(hosts, 'node')}, {facts['backend']}, {facts['device']}, "
        f"torch {torch.__version__}, moesys {__version__}, {date.today().isoformat()}"
    )
    console.print(
        "bytes: all bytes that a rank sends, its own part included; algbw = bytes / time, busbw as in nccl-tests"
    )
    seen = dict.fromkeys((r.kind, r.group, r.dtype) for r in results)
    for kind, group, dtype in seen:
        mine = [r for r in results if (r.kind, r.group, r.dtype) == (kind, group, dtype)]
        console.print(table(mine, f"{kind}, {mine[0].names} groups of {mine[0].ranks}, {dtype}"))
    fitted = Table(title="links: seconds = α + bytes / β", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("collective", "α µs", "β GB/s", "median error", "worst"):
        fitted.add_column(name, justify="left" if name == "collective" else "right")
    for name, line in lines(results).items():
        values = f"{line.alpha * 1e6:,.1f}", f"{line.bandwidth / 1e9:.3f}", f"{line.error:.0%}", f"{line.worst:.0%}"
        fitted.add_row(name, *values)
    if fitted.row_count:
        console.print(fitted)
    flat_links: dict[LinkModel, list[str]] = {}
    for name, line in flat(results).items():
        flat_links.setdefault(line, []).append(name)
    for line, names in flat_links.items():
        console.print(
            f"{' = '.join(names)}: no bandwidth can be fitted (β = ∞): up to {human(int(line.largest))} took no longer "
            f"than {human(int(line.smallest))}, so it is in no profile; {LARGER}",
            highlight=False,
            soft_wrap=True,
        )


def table(results: list[CollectiveResult], title: str) -> Table:
    """A row for each size; microseconds and 10⁹ bytes per second."""
    plain = any(r.plain is not None for r in results)
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    names = ["bytes", "median\nµs", "min", "p95", "max", "wait", "transfer", "algbw\nGB/s", "busbw", "wrong"]
    for name in [*names, *(["/ plain"] if plain else []), "waited\nfor"]:
        shown.add_column(name, justify="right", no_wrap=True)
    for r in results:
        facts = r.as_json()
        per = facts["out_of_place_per_iter"]
        times = per["p50_us"], per["min_us"], per["p95_us"], per["max_us"], facts["wait_us"], facts["transfer_us"]
        rates = [f"{r.algbw / 1e9:.3f}", f"{r.busbw / 1e9:.3f}", str(r.wrong)]
        ratio = [] if not plain else ["" if r.plain is None else f"{r.seconds / r.plain:.2f} ± {r.noise:.2f}"]
        late = "" if r.straggler is None else f"rank {r.straggler[0]}"
        shown.add_row(human(r.bytes), *(f"{t:.0f}" for t in times), *rates, *ratio, late)
    return shown


def progress_line(line: str) -> str:
    """A line of progress for a result in JSON."""
    r = json.loads(line)
    return f"{r['collective']:<17} {r['group']:<6} {human(r['size']):>8} {r['out_of_place']['time']:>12,.1f} µs"


def as_json(results: list[CollectiveResult], facts: dict[str, Any], options: BenchmarkOptions) -> dict[str, Any]:
    """The shape of nccl-tests' `-J`, with our own keys after theirs."""
    rates = [r.busbw / 1e9 for r in results]
    return {
        "version": __version__,
        "args": asdict(options),
        "env": {k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "GLOO_"))},
        "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if facts["backend"] == "nccl" else None,
        "config": {**facts, "host": socket.gethostname(), "torch": torch.__version__, "date": date.today().isoformat()},
        "results": [r.as_json() for r in results],
        "out_of_bounds": sum(r.wrong for r in results),
        "average_bus_bandwidth": sum(rates) / len(rates) if rates else None,
        "links": {name: asdict(line) for name, line in lines(results).items()},
    }
