"""Runs the parts of the check, each in a process of its own with its own time limit, and reports their results.

A part that crashes, hangs or leaves the GPU in error costs one row, and the others still run. Processes are forked from
one that has imported everything and never used a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic, sleep

from moesys.files import write_json, write_whole
from moesys.measure.gpu_check import rows
from moesys.measure.gpu_check.rows import CheckTask, Part, Row
from moesys.measure.gpu_check.table import CheckReport, PartResult

GRACE_S = 3.0
"""Seconds between a part's time limit and the forced end of its process."""

CRASHED = 1
"""Exit code of a part with an error."""


@dataclass(frozen=True)
class CheckPart:
    """A part of the check. Its module has a function `run`; `limit_s` are its most seconds."""

    name: str
    about: str
    limit_s: float
    module: str = ""

    def run(self) -> Part:
        """The part's rows, as an iterator."""
        run: Part = import_module(self.module or f"moesys.measure.gpu_check.{self.name}").run
        return run


PLANS = (
    CheckPart("facts", "the device and the software", 20),
    CheckPart("attention", "torch's kernel for each attention shape of the shipped models", 35),
    CheckPart("ranks", "an MoE layer over processes, on NCCL and gloo", 60),
    CheckPart("kernels", "Triton's kernels beside their definitions", 80),
    CheckPart("layers", "one MoE layer beside its arithmetic: moesys bench layer", 80),
    CheckPart("blocks", "one block, compiled and not", 100),
    CheckPart("kernel_tests", "the compiled tests of kernels", 75),
)
"""All parts in their order. Together they take less than 8 minutes."""


def run(plans: Sequence[CheckPart], dry: bool, folder: Path, patience: float, command: str) -> CheckReport:
    """Run the parts, print each row, and write `gpu-check.json` and `gpu-check.md` into `folder`.

    Args:
        folder: made if it does not exist. It keeps the output of each part as PART.log.
        patience: factor on every part's seconds.
        command: the command line, for the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"moesys.measure.gpu_check.{plan.name}" for plan in plans if not plan.module])
    found: list[PartResult] = []
    for plan in plans:
        limit = plan.limit_s * patience
        print(f"{plan.name}: {plan.about}, {limit:.0f} s at most", flush=True)
        process = context.Process(target=work, args=(plan, folder, limit, dry))
        found.append(_part(plan, process, folder, limit))
        report = CheckReport(date.today().isoformat(), command, dry, found)
        # After every part: a stopped check leaves its results.
        write_json(folder / "gpu-check.json", report.as_json())
        write_whole(folder / "gpu-check.md", report.markdown())
    return report


def work(plan: CheckPart, folder: Path, limit: float, dry: bool) -> None:
    """Run a part in its process: write each row to its file, and all output to its log."""
    os.setsid()  # one signal ends it with all that it started
    with (folder / f"{plan.name}.log").open("w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    for row in plan.run()(CheckTask(dry, folder, monotonic() + limit)):
        rows.append(folder / f"{plan.name}.rows", row)


def _part(plan: CheckPart, process: ForkServerProcess, folder: Path, limit: float) -> PartResult:
    """Run one part to its end, or to its time limit."""
    found, log = folder / f"{plan.name}.rows", folder / f"{plan.name}.log"
    for path in (found, log):
        path.unlink(missing_ok=True)
    process.start()
    begin, shown = monotonic(), 0
    try:
        while process.is_alive() and monotonic() < begin + limit + GRACE_S:
            sleep(0.1)
            shown = _show(rows.read(found), shown)
    finally:
        late = process.is_alive()
        _end(process)
    every = rows.read(found) + _ending(plan, process.exitcode, late, limit, log)
    _show(every, shown)
    return PartResult(plan.name, plan.about, every, monotonic() - begin, limit)


def _show(every: Sequence[Row], shown: int) -> int:
    """Print the rows from number `shown` on; returns the number of rows."""
    for row in every[shown:]:
        print(f"  {row.state:<8} {row.what}: {row.said}", flush=True)
    return len(every)


def _end(process: ForkServerProcess) -> None:
    """End the process and all processes that it started."""
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _ending(plan: CheckPart, code: int | None, late: bool, limit: float, log: Path) -> list[Row]:
    """A failed row for a part that did not finish; none otherwise."""
    what = f"all of {plan.name}"
    if late:
        said = f"not finished within {limit:.0f} s, except for the rows above; --patience 2 doubles the time"
        return [Row(what, "failed", said)]
    if code == 0:
        return []
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    died = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return [Row(what, "failed", f"its process ended with {died}: {lines[-1] if lines else 'no output'}")]
