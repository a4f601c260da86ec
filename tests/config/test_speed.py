"""A wrong configuration is answered at once, and without torch."""

import subprocess
import sys

WORST = """
include: [nowhere.yaml, broken.yaml]
lr: 3
model: {hidden: two, layer: 4, moe: {experts: 1e3, ffn_hiden: 3}, attention: 5}
parallel: {tpp: 2, dp: none, pp_split: [1, 0], pp_schedule: 1F1B}
train: {optimizer: {betas: [0.9, 1], clip: none}, steps: 1_000, dtype: fp32, heads: 3}
launch: {env: {A: 1}}
seed: -1
seed: 0
"""
PROGRAM = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call"
sys.setprofile(count)
from pathlib import Path
from moesys.config import Config
from moesys.config.load import load
from moesys.errors import ConfigError
try:
    load(Path(sys.argv[1]), ["train.steps=x", "foo"])
except ConfigError as error:
    sys.setprofile(None)
    print(len(error.problems), [m for m in ("torch", "ray", "numpy", "rich") if m in sys.modules])
    print(calls)
"""


def test_the_worst_file_is_answered_at_once_and_without_torch(tmp_path):
    """Calls of functions, imports included, are as many on a busy machine: 250,000 take about 0.7 s."""
    path = tmp_path / "run.yaml"
    path.write_text(WORST)
    (tmp_path / "broken.yaml").write_text("a: [")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    found, calls = done.stdout.splitlines()
    assert found == "20 []"
    assert int(calls) < 250_000
