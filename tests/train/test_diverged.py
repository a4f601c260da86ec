"""A run whose numbers stop being finite, through the command: what is said, what is left, and who can read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import changed

from moesys.config.schema import SkipsConfig
from moesys.errors import TrainingError
from moesys.train import checkpoint, manifest
from moesys.train.backlog import StepMeasurements
from moesys.train.guard import Guard


def launched(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moesys.cli", "launch", str(path), "--launcher", "local", *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=300)


def strict(path: Path) -> list:
    """Every JSON value in a file, by a parser that knows no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}")

    texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [json.loads(text, parse_constant=refuse) for text in texts]


@pytest.fixture(scope="module")
def diverged(small: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A run of three steps, which then goes on with a learning rate that ruins its weights in one step."""
    folder = tmp_path_factory.mktemp("diverged")
    raw = changed(
        small,
        {
            "cluster": {"ranks_per_node": 2},
            "parallel": {"ep": 2},
            "model": {"layers": 2, "hidden": 32},
            "train": {"steps": 3, "eval_sequences": 8, "schedule": {"kind": "constant"}, "skips": {"consecutive": 2}},
            "output": {"runs": str(folder), "checkpoint_every": 1, "keep": 2},
            "measure": {"every": 1},
        },
    )
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(raw))
    return folder / "bad", [launched(path), launched(path, "train.optimizer.lr=1e30", "train.steps=9")]


def test_the_run_stops_and_says_where_it_went_wrong(diverged):
    _, (good, bad) = diverged
    assert good.returncode == 0, good.stderr
    text = bad.stdout + bad.stderr
    assert bad.returncode == 1 and "Traceback" not in text and "NaN or Inf" not in text, text
    assert "step 7: skipped because it is not finite, 3 in a row, and train.skips.consecutive is 2: loss " in text
    assert "norm of the gradients" in text and "first in the gradient of" in text and "remedy: lower" in text
    assert "step 5: skipped because it is not finite" in bad.stdout


def test_good_checkpoints_stay(diverged):
    run, _ = diverged
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000006"]
    assert [manifest.read(run / "checkpoints" / name).state["skips"]["consecutive"] for name in kept] == [0, 0, 2]


def test_every_file_is_json_to_a_strict_parser(diverged):
    run, _ = diverged
    found = {path.name: strict(path) for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]}
    assert {"metrics.jsonl", "load.jsonl", "summary.json", "ranks.json", "moesys.json"} <= found.keys()
    steps = [record for record in found["metrics.jsonl"] if "grad_norm" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["grad_norm"] is None for record in steps] == [False] * 4 + [True] * 3
    assert [record["skipped"] for record in steps] == [0, 0, 0, 0, 1, 2, 3]
    assert [record["step"] for record in found["metrics.jsonl"] if "warning" in record] == [5, 6, 7]


def folders(tmp_path: Path, counts: list[int]) -> Path:
    for step, count in enumerate(counts, 1):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / checkpoint.META).write_text(
            json.dumps({"step": step, "samples": 0, "model": {}, "state": {"skips": {"consecutive": count}}})
        )
    return tmp_path


@pytest.mark.parametrize(
    "counts, keep, removed",
    [
        ([0, 0, 0], 2, [1]),
        ([0, 0, 1], 2, []),
        ([0, 0, 1, 2], 2, [3]),
        ([0, 0, 1, 2, 0], 2, [1, 3, 4]),
        ([0, 1], 1, []),
        ([1, 2, 3], 2, [1, 2]),
    ],
)
def test_a_checkpoint_of_skipped_steps_takes_the_place_of_no_good_one(tmp_path, counts, keep, removed):
    found = checkpoint.surplus(folders(tmp_path, counts), keep)
    assert [int(path.name[-1]) for path in found] == removed


def test_a_checkpoint_that_cannot_be_read_takes_no_place_and_stays(tmp_path):
    folder = folders(tmp_path, [0, 0, 0, 0])
    (folder / "step-00000003" / checkpoint.META).write_text("{")
    assert [int(path.name[-1]) for path in checkpoint.surplus(folder, 2)] == [1]
    assert [int(path.name[-1]) for path in checkpoint.surplus(folder, 1)] == [1, 2]


class Engine:
    """Of which all that matters is finite."""

    def nonfinite(self) -> list[str]:
        return []


def ended(allowed: SkipsConfig, bad: list[bool], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a run with such steps ends with."""
    monkeypatch.setattr("moesys.train.guard.gathered", lambda *names: [list(part) for part in names])
    guard = Guard(allowed)
    for step, is_bad in enumerate(bad, 1):
        norm = float("nan") if is_bad else 1.0
        guard.take(StepMeasurements(step, {"loss": 1.0}, None, norm, is_bad, lambda: ["norm.weight"]), Engine())
        try:
            guard.check(Path("runs/a/checkpoints/step-00000001"))
        except TrainingError as error:
            return str(error)
    return None


def test_a_run_survives_as_many_skips_as_are_allowed(monkeypatch):
    allowed = SkipsConfig(consecutive=2, total=3)
    assert ended(allowed, [True, True, False, True, False], monkeypatch) is None
    in_a_row = ended(allowed, [False, True, True, True], monkeypatch)
    assert "step 4: skipped because it is not finite, 3 in a row, and train.skips.consecutive is 2" in in_a_row
    in_all = ended(allowed, [True, False] * 4, monkeypatch)
    assert "step 7: skipped because it is not finite, 4 in this run, and train.skips.total is 3" in in_all
    assert "loss 1, norm of the gradients nan, first in the gradient of norm.weight" in in_all
    assert "the run goes on from runs/a/checkpoints/step-00000001" in in_all
    assert "step 1: " in ended(SkipsConfig(consecutive=0), [True], monkeypatch)
