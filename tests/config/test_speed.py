"""A wrong configuration is answered at once, and without torch."""

import resource
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
from pathlib import Path
from moesys.config import Config
from moesys.config.load import load
from moesys.errors import ConfigError
try:
    load(Path(sys.argv[1]), ["train.steps=x", "foo"])
except ConfigError as error:
    print(len(error.problems), [m for m in ("torch", "ray", "numpy", "rich") if m in sys.modules])
"""


def cpu_seconds() -> float:
    """Processor time of all children so far: on an idle machine the time that the user waits."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_worst_file_is_answered_in_less_than_0_7_seconds_without_torch(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(WORST)
    (tmp_path / "broken.yaml").write_text("a: [")
    seconds = []
    for _ in range(3):
        before = cpu_seconds()
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
        seconds.append(cpu_seconds() - before)
        assert done.stdout == "20 []\n", done.stdout
    assert min(seconds) < 0.7
