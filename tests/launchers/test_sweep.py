"""Sweeps: all runs are checked before one starts, finished ones are not repeated, one table at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from support import changed

from moesys import cli
from moesys.errors import CheckpointError, ConfigError
from moesys.launchers.sweep import Sweep, figures, run


@pytest.fixture
def file(small, tmp_path):
    """A base configuration, and a function that writes a sweep of it."""
    change = {
        "model": {"layers": 1},
        "train": {"steps": 2, "eval_sequences": 8},
        "launch": {"launcher": "local"},
        "output": {"runs": str(tmp_path / "runs"), "tensorboard": False},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(changed(small, change)))

    def write(**content):
        path = tmp_path / "two.yaml"
        path.write_text(yaml.safe_dump({"base": "base.yaml", **content}, sort_keys=False))
        return path

    return write


def test_lines_that_were_cut_cost_no_figure(tmp_path):
    (tmp_path / "summary.json").write_text('{"heldout_loss": 2.5, "config": {}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "imbalance": 1.5}\n{"step": 2, "lo')
    assert figures(tmp_path) == {"loss": 3.0, "imbalance": 1.5, "heldout_loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "warning": "nothing was logged"}\n')
    assert figures(tmp_path) == {"heldout_loss": 2.5}


def test_runs_are_trained_once_and_compared(file, tmp_path, capsys):
    path = file(
        overrides=["seed=3"],
        runs={"one": ["model.moe.top_k=1", "model.moe.normalize=false"], "dropping": ["model.moe.capacity_factor=0.5"]},
    )
    sweep = Sweep.load(path)
    assert [c.name for c in sweep.configs.values()] == ["two-one", "two-dropping"]
    assert {c.seed for c in sweep.configs.values()} == {3}
    assert run(sweep, Console()) == 0
    rows = json.loads((tmp_path / "runs" / "two" / "sweep.json").read_text())
    assert rows["one"]["dropped"] == 0 and rows["dropping"]["dropped"] > 0.2
    table = (tmp_path / "runs" / "two" / "table.md").read_text().splitlines()
    assert table[0].startswith("|  | held-out loss | bits per byte | imbalance | dropped |")
    assert table[2].split(" | ")[1] == f"{rows['one']['heldout_loss']:.3f}"
    before = (tmp_path / "runs" / "two-one" / "metrics.jsonl").stat().st_mtime_ns
    assert run(sweep, Console()) == 0
    assert (tmp_path / "runs" / "two-one" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "already trained" in capsys.readouterr().out
    # Other settings: no figure of the old ones stands for them.
    change = ["train.optimizer.lr=0.5"]
    with pytest.raises(CheckpointError) as caught:
        run(Sweep.load(path, change), Console())
    said = str(caught.value)
    assert (
        said.startswith("2 of 2 runs were trained with other settings") and said.count("lr: saved 0.001, now 0.5") == 2
    )
    assert f"rm -r {tmp_path}/runs/two-one {tmp_path}/runs/two-dropping" in said
    shutil.rmtree(tmp_path / "runs" / "two-one" / "checkpoints")  # the summary knows it as well
    with pytest.raises(CheckpointError, match="2 of 2 runs"):
        run(Sweep.load(path, change), Console())
    with pytest.raises(CheckpointError, match=r"train.steps: saved 2, now 3"):
        run(Sweep.load(path, ["train.steps=3"]), Console())
    assert "config" not in rows["one"]


def test_every_wrong_run_is_named_before_one_starts(file, tmp_path):
    path = file(runs={"good": [], "bad": ["model.moe.top_k=9"], "worse": ["parallel.pp=7"]})
    with pytest.raises(ConfigError) as caught:
        Sweep.load(path)
    text = str(caught.value)
    assert "run bad" in text and "top_k" in text and "run worse" in text and "run good" not in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"runs": {}}, "runs: must name at least one run"),
        ({"rums": {}}, "rums: unknown key; a sweep has base, overrides, runs\n    remedy: did you mean runs?"),
        ({"runs": {"a": 3}}, "runs.a is 3: must be a list of texts"),
        ({"runs": {"a": [1]}}, "runs.a is [1]: must be a list of texts"),
        ({"runs": ["a"]}, "runs is ['a']: must be a mapping of names to a list of texts"),
        ({"runs": {"a/b": []}}, "runs.a/b: a name here must be text of letters, digits, dots, dashes and underscores"),
        ({"base": 3, "runs": {"a": []}}, 'base is 3: must be text\n    remedy: put it in quotes: "3"'),
        ({"overrides": "seed=1", "runs": {"a": []}}, "overrides is 'seed=1': must be a list of texts"),
        ({"base": "nowhere.yaml", "runs": {"a": []}}, "run a: "),
    ],
)
def test_a_wrong_file_is_told_in_our_words(file, content, said, capsys):
    assert cli.main(["sweep", str(file(**content))]) == 2
    told = capsys.readouterr().err
    assert said in told and "Input should" not in told and "two.yaml" in told


@pytest.mark.parametrize("text", [b"\xff", b"runs: [", b"- a", b"", b"a: &a [*a]", b'base: "\\0"'])
def test_what_is_no_sweep_is_told(tmp_path, capsys, text):
    path = tmp_path / "two.yaml"
    path.write_bytes(text)
    assert cli.main(["sweep", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_missing_file_is_one_message(tmp_path, capsys):
    assert cli.main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_a_sweep_may_have_any_file_name(file, tmp_path):
    path = file(runs={"one": []}).rename(tmp_path / "my $sweep$ {1}.yaml")
    assert [c.name for c in Sweep.load(path).configs.values()] == ["my-sweep-1-one"]


def test_the_shipped_sweep_is_legal():
    sweep = Sweep.load(Path(__file__).parents[2] / "configs" / "sweeps" / "gates.yaml")
    assert len(sweep.configs) == 6
    assert len({c.model.moe.gate.kind for c in sweep.configs.values() if c.model.moe is not None}) == 4


def test_a_sweep_does_not_only_submit(file):
    path = file(overrides=["launch.launcher=slurm"], runs={"one": []})
    with pytest.raises(ConfigError, match=r"run one: launch\.launcher is slurm: only submits a run, and a sweep waits"):
        Sweep.load(path)


def test_a_record_that_was_cut_short_spoils_no_table(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert figures(tmp_path) == {"loss": 2.5}
    (tmp_path / "metrics.jsonl").unlink()
    assert figures(tmp_path) == {}
