"""The examples are short, and run as a reader runs them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *words: str, ranks: int = 0) -> str:
    """What an example prints; `ranks`: started by torchrun in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")


def test_an_moe_layer_learns_in_a_plain_loop():
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run("moe_layer", "--steps", "30"))]
    assert len(losses) == 3 and losses[2] < losses[0] < 5.55, "below that of guessing one of 256 bytes"


def test_expert_parallelism_learns_in_an_own_fsdp2_loop():
    out = run("expert_parallel_fsdp2", "--steps", "20", ranks=2)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", out)]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_all_to_all_of_a_foreign_model_is_told_by_layer():
    out = run("measure_foreign_model", "--steps", "5", ranks=2)
    assert re.search(r"all-to-all is [\d.]+% of the step", out.lower())
    legs = re.findall(r"^(\w+) +(dispatch|combine) +(forward|backward)", out, re.M)
    ways = [("dispatch", "forward"), ("combine", "forward"), ("combine", "backward"), ("dispatch", "backward")]
    assert set(legs) == {(layer, *way) for layer in ("first", "second") for way in ways}
