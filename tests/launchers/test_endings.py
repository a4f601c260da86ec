"""Every way in which a worker may end, with real processes: each is told by its cause, in one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesys.launchers import crash
from moesys.launchers.local import LocalWorkers
from moesys.launchers.outcome import Outcome
from moesys.launchers.spec import RunSpec

WORKER = Path(__file__).with_name("ending_worker.py")


@pytest.fixture
def ended(config, tmp_path: Path) -> Callable[..., Outcome]:
    """`ended(mode)` is the outcome of two workers of which rank 1 ends like that."""

    def run(mode: str, run_dir: Path = tmp_path / "run", command: list[str] | None = None) -> Outcome:
        sections = {"cluster": {"ranks_per_node": 2, "device": "cpu"}, "launch": {"env": {"MOESYS_TOY": mode}}}
        workers = LocalWorkers(
            RunSpec.of(config(**sections), run_dir), command or [sys.executable, str(WORKER), str(run_dir)]
        )
        try:
            workers.start(lambda phase: None)
            while (outcome := workers.poll()) is None:
                time.sleep(0.02)
            return outcome
        finally:
            workers.stop()

    return run


SENTENCES = {
    "user": (2, r" failed:\nthe corpus is empty\n    remedy: give it text$"),
    "phrase": (2, r" failed:\nthe server said: connection refused, address already in use$"),
    "bug": (1, r" failed: KeyError: 'x'\nTraceback "),
    "import": (1, r" failed: ModuleNotFoundError: No module named 'no_such_package'\nTraceback "),
    "memory": (1, r" failed: out of memory: MemoryError\n    remedy: lower .*\n    traceback: \S*1\.txt$"),
    "folder": (1, r" failed: .*/run: is a directory\n    remedy: .*\n    traceback: "),
    "sysexit": (5, r" failed: SystemExit: 5\n"),
    "segv": (139, r" was killed by SIGSEGV \(a fault in compiled code\): Segmentation fault\nthe last [^\0]* in run"),
    "quit": (7, r" exited with code 7\nthe last lines of .*\n  good bye$"),
    "143": (143, r" exited with code 143, as on SIGTERM \(by someone, or by a scheduler or service manager\)$"),
    "SIGTERM": (143, r" was killed by SIGTERM \(by someone, or by a scheduler or service manager\)$"),
    "SIGKILL": (137, r" was killed by SIGKILL \(by someone"),
    "SIGABRT": (134, r" was killed by SIGABRT \(compiled code gave up\): Aborted\n"),
    "SIGBUS": (135, r" was killed by SIGBUS \(a file in use was cut short, or shared memory is full: [\d,]+ bytes "),
    "SIGUSR1": (138, r" was killed by SIGUSR1 \(schedulers announce the end of a job's time like this\)$"),
}  # fmt: skip
"""What rank 1 does, its exit code, and what is told."""


@pytest.mark.parametrize("mode", SENTENCES)
def test_the_cause_is_told_in_a_sentence(ended, mode):
    code, told = SENTENCES[mode]
    outcome = ended(mode)
    assert outcome.exit_code == code
    assert re.search(r"^rank 1 \(pid \d+, node \S+\)" + told, outcome.message), outcome.message


def test_a_program_that_cannot_be_imported_is_told(ended, tmp_path):
    command = [sys.executable, "-m", "moesys.train.rank", "moesys.no_such_program", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {hidden: 8, layers: 1}\n")
    assert "failed: ModuleNotFoundError: No module named 'moesys.no_such_program'" in ended("", command=command).message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
def test_a_full_disk_is_told_though_nothing_can_be_written_to_it(ended, small_disk):
    outcome = ended("disk", small_disk / "run")
    assert outcome.exit_code == 1
    assert f"failed: no space left on the disk of {small_disk}/run" in outcome.message
    assert ": 0 bytes are free\n    remedy: free some space there, or set output.runs" in outcome.message


def test_the_kernels_count_tells_who_killed(tmp_path, monkeypatch):
    assert crash._killer(3, 3) == "by someone: the kernel counted no process killed for lack of memory"
    assert crash._killer(3, 4).startswith("by the kernel, for lack of memory")
    assert crash._killer(None, 4) == "by someone, or by the kernel for lack of memory"
    (tmp_path / "vmstat").write_text("pgpgin 5\noom_kill 12\nswap_ra 0\n")
    monkeypatch.setattr(crash, "VMSTAT", tmp_path / "vmstat")
    assert crash.kills() == 12
    monkeypatch.setattr(crash, "VMSTAT", tmp_path / "absent")
    assert crash.kills() is None


LOGS = {
    "Traceback (most recent call last):\n  File \"x\", line 1\n    import torch\nImportError: libcudart: cannot open\n":
        "ImportError: libcudart: cannot open",
    "terminate called after throwing an instance of 'gloo::IoException'\n  what():  Connection closed by peer\n":
        "Connection closed by peer",
    "[rank1]:[E] [PG 0 Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)\nterminate called\n":
        "[rank1]:[E] [PG 0 Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)",
    "step 1\nstep 2\n": None,
}  # fmt: skip


@pytest.mark.parametrize("log", LOGS)
def test_the_error_that_a_log_ends_with(log):
    assert crash.last_words(log) == LOGS[log]
