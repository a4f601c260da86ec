"""Whole runs through the command: interrupted, resumed, refused; what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest
import yaml
from support import changed

from moesys import cli
from moesys.train import checkpoint

STEPS = 30


@pytest.fixture(scope="module")
def config(small: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers, experts over both, sharded data; a checkpoint every five steps."""
    folder = tmp_path_factory.mktemp("runs")
    raw = changed(
        small,
        {
            "cluster": {"ranks_per_node": 2},
            "parallel": {"ep": 2, "dp_shard": "full"},
            "train": {"steps": STEPS, "eval_sequences": 8, "schedule": {"kind": "cosine", "warmup": 5}},
            "output": {"runs": str(folder), "checkpoint_every": 5, "keep": 2},
            "model": {"layers": 2},
        },
    )
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def start(config: Path, name: str, launcher: str, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "moesys.cli",
        "launch",
        str(config),
        "--launcher",
        launcher,
        f"name={name}",
        *overrides,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=config.parent, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 600) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def records(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [r["step"] for r in steps] == sorted({r["step"] for r in steps}), "each step once, in order"
    return {r["step"]: r for r in steps}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = monotonic() + 600
    while monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        path = run / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        sleep(0.02)
    raise AssertionError(f"no step {step} in {run}")


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """A run that nothing interrupts."""
    code, output = finish(start(config, "whole", "local"))
    assert code == 0, output
    assert "held-out loss" in output
    return config.parent / "whole"


def test_a_run_leaves_what_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    keys = {
        "heldout_loss",
        "unigram_loss",
        "bigram_loss",
        "tokens_per_second",
        "all_to_all_share",
        "steps",
        "world_size",
    }
    assert keys <= summary.keys()
    assert summary["steps"] == STEPS and summary["world_size"] == 2
    assert 0 < summary["all_to_all_share"] < 1
    assert sorted(records(whole)) == list(range(1, STEPS + 1))
    losses = [record["loss"] for record in records(whole).values()]
    assert losses[-1] < losses[0] - 0.5
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == ["step-00000025", "step-00000030"]
    ranks = json.loads((whole / "ranks.json").read_text())
    assert [r["rank"] for r in ranks] == [0, 1] and {"host", "pid", "ep"} <= ranks[0].keys()
    loads = [json.loads(line) for line in (whole / "load.jsonl").read_text().splitlines()]
    assert [record["step"] for record in loads] == list(range(1, STEPS + 1))
    # 8 sequences of 16 tokens, 2 experts each, in both layers.
    assert {sum(layer) for record in loads for layer in record["load"]} == {8 * 16 * 2}
    shares = [max(layer) / (sum(layer) / 4) for layer in loads[-1]["load"]]
    assert sum(shares) / 2 == pytest.approx(records(whole)[STEPS]["imbalance"])
    assert yaml.safe_load((whole / "config.yaml").read_text())["parallel"]["ep"] == 2
    assert list((whole / "tensorboard").iterdir())


def test_a_killed_run_ends_and_resumes_to_the_same_loss(config, whole):
    """Killed under Ray, resumed and killed again as local processes, and resumed to its end."""
    run = config.parent / "killed"
    for launcher, step in (("ray", 8), ("local", 18)):
        process = start(config, run.name, launcher)
        wait_for_step(run, step, process)
        victim = json.loads((run / "ranks.json").read_text())[1]["pid"]
        os.kill(victim, signal.SIGKILL)
        code, output = finish(process)
        assert code not in (0, None)
        assert "rank 1" in output and "SIGKILL" in output, output
        assert "Traceback" not in output
        assert not (run / "summary.json").exists()
        assert checkpoint.newest(run / "checkpoints").name >= f"step-{step // 5 * 5:08}"

    code, output = finish(start(config, run.name, "local"))
    assert code == 0, output
    told, expected = records(run), records(whole)
    assert sorted(told) == sorted(expected)
    for step, record in expected.items():
        assert told[step]["loss"] == pytest.approx(record["loss"], rel=1e-6), step
        assert told[step]["lr"] == record["lr"]
    ends = [json.loads((r / "summary.json").read_text())["heldout_loss"] for r in (run, whole)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_a_finished_run_is_not_trained_again(config, whole):
    before = json.loads((whole / "summary.json").read_text())
    code, output = finish(start(config, "whole", "local"))
    assert code == 0, output
    after = json.loads((whole / "summary.json").read_text())
    assert after.pop("heldout_loss") == pytest.approx(before.pop("heldout_loss"))
    assert after.pop("heldout_bits_per_byte") == pytest.approx(before.pop("heldout_bits_per_byte"))
    assert after == before
    assert f"nothing is left to train: {whole / 'checkpoints' / 'step-00000030'} is of step 30 of 30" in output


def test_a_finished_run_does_not_take_other_settings(whole, config, capsys):
    """Before anything starts: nothing is trained, nothing replaced, and no figure of 0.001 shown for 0.5."""
    before = {name: (whole / name).read_bytes() for name in ("config.yaml", "summary.json", "metrics.jsonl")}
    words = ["launch", str(config), "--launcher", "local", "name=whole", "train.optimizer.lr=0.5"]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "has no step left to train (30 are done, train.steps is 30)" in said
    row = "train.optimizer.lr: saved 0.001, now 0.5 (changes numbers)"
    assert f"\n  {row}\n    remedy: choose another run, name=NAME; or" in said
    assert {name: (whole / name).read_bytes() for name in before} == before


def test_a_checkpoint_of_another_model_is_refused(config, whole, capsys):
    before = (whole / "config.yaml").read_text()
    words = ["launch", str(config), "--launcher", "local", "name=whole", "model.hidden=32", f"train.steps={STEPS + 1}"]
    assert cli.main(words) == 1
    output = capsys.readouterr().err
    assert "model.hidden: saved 64, now 32 (cannot fit)" in output and "remedy" in output
    assert "embed.weight has the shape [320, 64] there, and [320, 32] in this model" in output
    assert (whole / "config.yaml").read_text() == before
    assert checkpoint.newest(whole / "checkpoints").name == "step-00000030"


def test_workers_that_refuse_leave_the_configuration_as_it_was(config, whole, tmp_path):
    """Other text under the same path: that shows when workers have read it. The refusal is one message."""
    import shutil

    run = config.parent / "refused"
    shutil.copytree(whole, run)
    text = tmp_path / "text"
    shutil.copytree(yaml.safe_load(config.read_text())["data"]["path"], text)
    (text / "more.py").write_text("x = 1\n" * 999)
    before = (run / "config.yaml").read_text()
    code, output = finish(start(config, "refused", "local", f"train.steps={STEPS + 1}", f"data.path={text}"))
    assert code == 1 and "Traceback" not in output
    assert "data.path: saved " in output and "add 'train.resume_changed=[data.path]'" in output
    assert (run / "config.yaml").read_text() == before


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    (tmp_path / ".partial-00000009").mkdir()
    (tmp_path / "step-00000009").mkdir()
    complete = tmp_path / "step-00000005"
    complete.mkdir()
    assert checkpoint.newest(tmp_path) is None
    (complete / checkpoint.META).write_text("{}")
    assert checkpoint.newest(tmp_path) == complete


def test_a_run_continues_under_another_combination(config, whole):
    """The layout is no part of a checkpoint: two more steps on four ranks equal two more on two."""
    import shutil

    ends = []
    for name, overrides in (
        ("same", []),
        ("other", ["parallel.tp=2", "parallel.pp=2", "parallel.dp_shard=1", "cluster.ranks_per_node=4"]),
    ):
        run = config.parent / name
        shutil.copytree(whole, run)
        code, output = finish(start(config, name, "local", f"train.steps={STEPS + 2}", *overrides))
        assert code == 0, output
        ends.append([records(run)[step]["loss"] for step in (STEPS + 1, STEPS + 2)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
