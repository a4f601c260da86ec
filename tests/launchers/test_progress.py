"""The live display and the summary, from files as rank 0 writes them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moesys.launchers import summary
from moesys.launchers.progress import LiveDisplay, evaluation, line_of
from moesys.launchers.tail import Tail
from moesys.train.heartbeat import Heartbeat, phase

STEP = {
    "step": 1, "steps": 100, "loss": 5.1234, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_second": 12345.6,
    "imbalance": 1.25, "all_to_all_share": 0.125, "eta_s": 3725.0,
}  # fmt: skip


def record(run_dir: Path, **changes: object) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(STEP | changes) + "\n")


def shown(run_dir: Path, write, terminal: bool = False, **options: float) -> str:
    """What is printed while `write` is called between two refreshes."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with LiveDisplay(run_dir, console, **options) as progress:
        progress.phase("starting 4 workers")
        write(progress)
        progress.refresh()
    return console.file.getvalue()


def test_what_libraries_note_for_themselves_stays_in_the_log(tmp_path: Path) -> None:
    noise = (
        "[W1127 23:05:05.123456789 socket.cpp:767] [c10d] The hostname of the client socket cannot be …",
        "[I1127 23:05:05.123456789 ProcessGroupNCCL.cpp:954] [PG 0 Rank 0] initialization options: size: 2",
        "USDT:2026-11-27 23:25:36 24045:24045 SyncActivityProfilerHandler.cpp:52] profiler_start",
        "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1",
    )
    signal = (
        "[E1127 23:05:05.1 ProcessGroupNCCL.cpp:632] Watchdog caught collective operation timeout",
        "[W] of a user",
    )

    def write(progress: LiveDisplay) -> None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "rank-0.log").write_text("".join(f"{line}\n" for line in (*noise, *signal)) + noise[0])

    text = shown(tmp_path, write)
    assert all(line in text for line in signal)
    assert not any(line[:20] in text for line in noise)


def test_a_line_has_all_figures():
    assert line_of(STEP) == (
        "step 1/100  loss 5.1234  tokens/s 12,346  grad norm 1.500  imbalance 1.25  exposed a2a 12.5%  left 1:02:05"
    )
    dense = {key: value for key, value in STEP.items() if key not in ("imbalance", "eta_s")} | {
        "all_to_all_share": None
    }
    assert line_of(dense) == "step 1/100  loss 5.1234  tokens/s 12,346  grad norm 1.500"


def test_an_evaluation_has_every_text():
    losses = {"step": 9, "heldout_loss": 2.0, "heldout_bits_per_byte": 3.0}
    more = {"eval/wiki/loss": 2.5, "eval/wiki/bits_per_byte": 3.5, "eval/code/loss": None}
    assert evaluation(losses | more) == (
        "step 9: held-out loss 2.0000 (3.0000 bits per byte), wiki 2.5000 (3.5000 bits per byte), code not finite"
    )


def test_plain_lines_come_every_tenth(tmp_path):
    out = shown(tmp_path, lambda progress: [record(tmp_path, step=step) for step in range(1, 101)])
    steps = [int(line.split()[1].split("/")[0]) for line in out.splitlines() if line.startswith("step")]
    assert steps == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_plain_lines_come_after_the_interval(tmp_path):
    out = shown(tmp_path, lambda progress: [record(tmp_path, step=step) for step in (1, 2, 3)], interval_s=0.0)
    assert out.count("step ") == 3


def test_phases_and_evaluations_are_told(tmp_path):
    def write(progress: LiveDisplay) -> None:
        with Heartbeat(tmp_path, 0):
            phase("loading data", shown=True)
            progress.refresh()
            record(tmp_path)
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 7, "heldout_loss": 2.5}) + "\n")
            phase("saving a checkpoint")
            progress.refresh()
            phase("writing the report", shown=True)

    lines = shown(tmp_path, write).splitlines()
    assert lines[:2] == ["starting 4 workers …", "loading data …"]
    assert lines[2].startswith("step 1/100") and lines[3:] == ["step 7: held-out loss 2.5000", "writing the report …"]


def test_what_is_not_finite_is_said(tmp_path):
    def write(progress: LiveDisplay) -> None:
        record(tmp_path, loss=None, grad_norm=None, skipped=2, dead_experts=3, collapsed_layers=0)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 7, "warning": "layers.0: no token for expert 1 since step 3"}) + "\n")
            file.write(json.dumps({"step": 7, "heldout_loss": None}) + "\n")

    lines = shown(tmp_path, write).splitlines()[1:]
    assert lines[0].startswith("step 1/100  loss not finite  tokens/s 12,346  grad norm not finite  imbalance 1.25")
    assert lines[0].endswith("skipped 2  dead experts 3  left 1:02:05")
    assert lines[1:] == ["step 7: layers.0: no token for expert 1 since step 3", "step 7: held-out loss not finite"]


def test_rank_0_is_heard(tmp_path):
    def write(progress: LiveDisplay) -> None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "rank-0.log").write_text("=== attempt 1, now\n[brackets] stay\nno end of line")

    assert shown(tmp_path, write).splitlines()[1:] == ["[brackets] stay", "no end of line"]


def test_a_terminal_gets_a_bar(tmp_path):
    out = shown(tmp_path, lambda progress: record(tmp_path, step=40), terminal=True)
    assert "starting 4 workers" in out and "40/100" in out and "━" in out and "12,346" in out


@pytest.mark.parametrize("replace", [False, True])
def test_lines_from_before_the_launch_are_left_out(tmp_path, replace):
    path = tmp_path / "log"
    path.write_text("old 1\nold 2\n")
    tail = Tail(path)
    assert tail.lines() == []
    if replace:
        (tmp_path / "new").write_text("old 1\n")
        (tmp_path / "new").replace(path)
        assert tail.lines() == []
    with path.open("a") as file:
        file.write("new 1\nnew")
    assert tail.lines() == ["new 1"]
    assert tail.last() == ["new"]
    assert tail.last() == []


def test_a_file_that_comes_later_is_read_from_its_beginning(tmp_path):
    tail = Tail(tmp_path / "log")
    assert tail.lines() == []
    (tmp_path / "log").write_bytes(b"\xff first\r\n")
    assert tail.lines() == ["\ufffd first"]


def test_the_summary_shows_the_loss_beside_the_simple_models(tmp_path):
    values = {
        "heldout_loss": 1.5,
        "unigram_loss": 3.25,
        "bigram_loss": 2.5,
        "tokens_per_second": 9999.6,
        "report": None,
    }
    (tmp_path / "summary.json").write_text(json.dumps(values | {"checkpoint": "/runs/x/checkpoints/step-00000010"}))
    console = Console(file=io.StringIO(), width=120)
    summary.show(tmp_path, console)
    out = console.file.getvalue()
    order = [out.index(text) for text in ("1.5000", "3.2500", "2.5000", "10,000 tokens/s", "step-00000010")]
    assert order == sorted(order)
    assert "report" not in out


@pytest.mark.parametrize("skipped", [0, 3])
def test_the_summary_says_what_went_wrong(tmp_path, skipped):
    values = {"heldout_loss": None, "skipped_steps": skipped, "routing": "layers.0: no token for expert 1 since step 3"}
    (tmp_path / "summary.json").write_text(json.dumps(values))
    console = Console(file=io.StringIO(), width=120)
    summary.show(tmp_path, console)
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in console.file.getvalue().splitlines()]
    assert ["held-out loss", "not finite"] in rows and ["routing", values["routing"]] in rows
    assert (["steps skipped", "3, not finite"] in rows) == bool(skipped)


def test_no_summary_no_table(tmp_path):
    console = Console(file=io.StringIO())
    summary.show(tmp_path, console)
    assert console.file.getvalue() == ""
