"""The GPU check on a machine without a GPU, and its handling of parts that fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from early import Command

from moesys.config.load import load
from moesys.measure.checkout import ROOT
from moesys.measure.gpu_check import attention, blocks, check, kernels, models, ranks
from moesys.measure.gpu_check.__main__ import PARTS, main
from moesys.measure.gpu_check.kernels import KernelCase
from moesys.measure.gpu_check.rows import CheckTask, Row
from moesys.measure.gpu_check.table import CheckReport, PartResult
from moesys.models.block import Block
from moesys.models.parts.model import block as describe

ABSENT = ("pydantic", "ray", "megatron", "rich", "tensorboard", "matplotlib", "prometheus_client", "datasets")
"""What the check must do without."""

DRY = CheckTask(True, Path("."), float("inf"))


def python(folder: Path, words: list[str]) -> Command:
    """Python with the modules in `folder` before all others."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    return Command([sys.executable, *words], env, ROOT)


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """`python`, to its end."""
    one = python(folder, words)
    return subprocess.run(one.words, env=one.env, cwd=one.cwd, capture_output=True, text=True)


def dry_run(folder: Path) -> Command:
    """The whole check without a GPU, by a Python with torch alone. Its results are in folder/out."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    words = ["-m", "moesys.measure.gpu_check", "--dry-run", "--patience=20", f"--out={folder / 'out'}"]
    return python(folder, words)


EARLY = {"test_a_dry_run_needs_torch_alone_and_fills_both_files": dry_run}


def test_a_dry_run_needs_torch_alone_and_fills_both_files(early):
    done, folder = early.result("test_a_dry_run_needs_torch_alone_and_fills_both_files")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "out" / "gpu-check.json").read_text())
    assert found["passed"] and found["dry_run"] and found["software"]["torch"] == torch.__version__
    rows = {part["part"]: part["rows"] for part in found["parts"]}
    assert list(rows) == list(PARTS)
    for part, given in rows.items():
        # Each says what ran here, and what a CPU cannot run.
        assert {row["state"] for row in given} == {"passed", "not run"}, part
    assert len(rows["attention"]) == 2 * len(attention.shapes()) + 1
    compiled = [row["figures"] for row in rows["blocks"] if row["figures"]]
    assert len(compiled) == len(models.BLOCKS) - 1 and all(f["graphs"] >= 2 and not f["breaks"] for f in compiled)
    table = (folder / "out" / "gpu-check.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + sum(map(len, rows.values()))
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in lines)
    assert "There was no GPU: shapes are shrunken" in table and f"torch {torch.__version__}" in table


TOYS = {
    "good": "    yield Row('one', 'passed', 'said')",
    "raises": "    yield Row('before', 'passed', 'said')\n    raise ValueError('the reason')",
    "crashes": "    os.kill(os.getpid(), signal.SIGSEGV)\n    yield",
    "hangs": "    yield Row('before', 'passed', 'said')\n    time.sleep(1000)",
}


def test_a_part_that_fails_is_one_row_and_the_others_still_run(tmp_path):
    head = "import os, signal, time\nfrom moesys.measure.gpu_check.rows import Row\n\ndef run(task):\n"
    for name, body in TOYS.items():
        (tmp_path / f"{name}.py").write_text(f"{head}{body}\n")
    plans = ", ".join(
        f"CheckPart({n!r}, 'about', {8 if n == 'hangs' else 600}, {n!r})"
        for n in ("hangs", "crashes", "raises", "good")
    )
    code = f"""
from pathlib import Path
from moesys.measure.gpu_check.check import CheckPart, run
run([{plans}], True, Path({str(tmp_path)!r}), 1.0, 'command')
"""
    done = run(tmp_path, ["-c", code])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    last = {part["part"]: part["rows"][-1] for part in found["parts"]}
    assert not found["passed"] and last["good"]["state"] == "passed"
    assert "exit code 1: ValueError: the reason" in last["raises"]["said"]
    assert "signal SIGSEGV" in last["crashes"]["said"]
    assert "not finished within 8 s" in last["hangs"]["said"] and "--patience" in last["hangs"]["said"]
    assert [len(part["rows"]) for part in found["parts"] if part["part"] in ("raises", "hangs")] == [2, 2]


@pytest.mark.parametrize(("state", "code"), [("passed", 0), ("not run", 0), ("failed", 1)])
def test_a_failed_row_is_the_exit_code(monkeypatch, tmp_path, capsys, state, code):
    found = PartResult("facts", "about", [Row("a|b", state, "two\nlines")], 1.0, 2.0)
    monkeypatch.setattr(check, "run", lambda *given: CheckReport("2026-01-01", "command", True, [found]))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["--dry-run", "--parts", "facts", f"--out={tmp_path}"]) == code
    assert f"1 row in 1 s: 1 {state}." in capsys.readouterr().out
    assert f"| facts | a\\|b | {state} | two lines |" in CheckReport("", "", True, [found]).markdown()


def test_all_parts_together_have_less_than_eight_minutes():
    assert sum(plan.limit_s + check.GRACE_S for plan in check.PLANS) < 8 * 60


def test_the_models_are_those_of_the_configurations():
    remedy = "run: python -m moesys.measure.gpu_check.models"
    assert models.sections() == json.loads(json.dumps(models.shipped())), remedy


@pytest.mark.parametrize("name", models.BLOCKS)
def test_blocks_are_those_that_the_configurations_build(name):
    config = load(ROOT / "configs" / "models" / f"{name}.yaml").config.model
    with torch.device("meta"):
        ours, theirs = Block(models.config(models.sections()[name]), 0), Block(config, config.depth - 1)
    assert str(ours) == str(theirs)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    plain = [
        {k: v for k, v in vars(block.ffn.gate).items() if isinstance(v, (int, float, str)) or is_dataclass(v)}
        for block in (ours, theirs)
    ]
    plain[0].pop("randomness"), plain[1].pop("randomness")  # differs between layers
    assert plain[0] == plain[1] and len(plain[0]) > 5
    assert (
        describe(models.config(models.sections()[name]), 0).mixer.head_sizes() == describe(config, 0).mixer.head_sizes()
    )


def test_the_quadratic_kernel_is_seen():
    q, wide = torch.randn(1, 4, 8, 16), torch.randn(1, 4, 8, 24)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert attention.ran(lambda: sdpa(q, q, wide, is_causal=True)) == "math"
    assert attention.ran(lambda: sdpa(q, q, q, is_causal=True)) == "flash"
    assert attention.ran(lambda: q + q) == ""


def test_a_kernel_that_computes_something_else_fails():
    x = torch.randn(5)
    wrong = KernelCase(lambda x: 1.001 * x.square(), lambda x: x.square(), [x])
    row = kernels._row(DRY, "squares", wrong, "torch", torch.float32)
    assert row.state == "failed" and "more than 1e-05" in row.said
    endless = KernelCase(lambda x: x / 0, lambda x: x.square(), [x])
    assert kernels._row(DRY, "squares", endless, "torch", torch.float32).state == "failed"


def test_a_block_that_is_not_compiled_fails(monkeypatch):
    monkeypatch.setattr(blocks, "GraphCounter", lambda backend: type("None", (), {"count": 0})())
    monkeypatch.setattr(blocks, "prepare", lambda *given: None)
    name = models.BLOCKS[0]
    row = blocks._row(DRY, name, models.sections()[name])
    assert row.state == "failed" and "0 graphs" in row.said and "nothing was compiled" in row.said


@pytest.mark.parametrize(
    ("codes", "text", "state", "said"),
    [
        ([0, 0], "", "passed", "NCCL takes both"),
        ([1, 1], "x\nDuplicate GPU detected : both on CUDA device 18000\n", "not run", "NCCL refuses: D"),
        ([None, None], "", "failed", "no output"),
        ([1, 1], "RuntimeError: something else\n", "failed", "RuntimeError: something else"),
    ],
)  # fmt: skip
def test_what_nccl_says_of_a_shared_gpu_is_told(monkeypatch, codes, text, state, said):
    monkeypatch.setattr(ranks, "_processes", lambda *given: (codes, [text] * 2))
    row = ranks._sharing(DRY, "what")
    assert (row.state, said in row.said) == (state, True), row
