"""Runs the repository's tests of kernels, as Triton compiles them for this GPU, each file in a process of its own.

Most of their time is compilation, which needs one core of the host. So several files run at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

from moesys.measure.checkout import ROOT
from moesys.measure.gpu_check.rows import CheckTask, Row
from moesys.words import plural

TESTS = ROOT / "tests" / "kernels"
NEEDED = ("pytest", "hypothesis", "triton")

INTERPRETED = "test_activation.py::test_rows_wider_than_a_program"
"""The test of a dry run. The repository's own tests interpret all kernels."""

LONGEST = "test_grouped_matmul.py"
"""The file with most compilation. It starts first."""


def run(task: CheckTask) -> Iterator[Row]:
    """A row for each file of tests, in the order in which they end."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing or not TESTS.is_dir():
        lack = f"{' and '.join(missing)} not installed" if missing else f"no {TESTS}: not a checkout"
        yield Row("tests/kernels", "not run", f"{lack}; the kernels are compared with their definitions above")
        return
    names = sorted((p.name for p in TESTS.glob("test_*.py")), key=lambda name: (name != LONGEST, name))
    names = [INTERPRETED] if task.dry else [name for name in names if name != "test_interpreted.py"]
    with ThreadPoolExecutor(1 if task.dry else max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        for done in as_completed([pool.submit(_row, task, name) for name in names]):
            yield done.result()
    if task.dry:
        yield Row("compiled tests", "not run", "they need a GPU; above, one test ran in Triton's interpreter")


def _row(task: CheckTask, name: str) -> Row:
    """The result of pytest for one file."""
    words = ["-k", "triton-cpu" if task.dry else "cuda or test_compile", "-p", "no:cacheprovider", "-vv"]
    command = [sys.executable, "-m", "pytest", *words, str(TESTS / name)]
    log = task.folder / f"{Path(name.replace('::', '-')).stem}.log"
    what = f"tests/kernels/{name}"
    try:
        with log.open("w", encoding="utf-8") as out:
            done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, timeout=max(1.0, task.seconds_left() - 3))
    except subprocess.TimeoutExpired:
        return _unfinished(what, log)
    text = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode == NOTHING_CHOSEN:
        return Row(what, "not run", "it has no tests of this device")
    numbers = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last_line(text))
    }
    said = last_line(text).strip("= ")
    if done.returncode:
        named = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        return Row(what, "failed", f"{said}: {', '.join(named[:3]) or 'see ' + str(log)}", numbers)
    ran = f"{plural(numbers.get('passed', 0), 'test')} passed"
    return Row(what, "passed" if numbers.get("passed") else "not run", ran if numbers.get("passed") else said, numbers)


def _unfinished(what: str, log: Path) -> Row:
    """The row of a file that ran out of time: no failure if some tests passed and none failed."""
    words = re.findall(r" (PASSED|FAILED|ERROR)\b", log.read_text(encoding="utf-8", errors="replace"))
    passed = words.count("PASSED")
    said = f"out of time after {plural(passed, 'passed test')}, {len(words) - passed} failed; --patience 2; see {log}"
    return Row(what, "not run" if 0 < passed == len(words) else "failed", said, {"passed": passed})


NOTHING_CHOSEN = 5
"""pytest's exit code if it selects no test."""


def last_line(text: str) -> str:
    """The last line that is not empty; "" without one."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
