"""The structure of the repository: floors of imports, and one name for every module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_floors_are_kept():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint, "--config", "pyproject.toml", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["parallel", "kernels", "launchers"])
def test_folders_are_imported_by_the_package_name_alone(name):
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import moesys.{name}, not {name}" in result.stderr
    subprocess.run([sys.executable, "-c", f"import moesys.{name}"], cwd=ROOT, check=True)


LACKING = ("torch", "ray", "megatron", "transformers", "triton")
"""What a machine need not have that only reads configurations and data, plans and submits."""

WITHOUT_TORCH = ("config", "data", "launchers.launch", "launchers.slurm", "launchers.dry_run", "launchers.what_if")
WITHOUT_TORCH += ("parallel.dimension", "parallel.cost", "parallel.memory", "models.size", "train.checked", "cli")


def test_what_needs_no_torch_runs_without_it():
    code = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({LACKING!r}))
for name in {WITHOUT_TORCH!r}:
    module = importlib.import_module("moesys." + name)
    for below in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"moesys.{{name}}.{{below.name}}")
from moesys import cli
for words in (["config", "FILE", "--check"], ["config", "FILE"], ["launch", "FILE", "--dry-run", "--launcher=slurm"]):
    assert cli.main([word.replace("FILE", "configs/mixtral-8x7b-16x8gpu.yaml") for word in words]) == 0, words
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "legal on 128 ranks" in done.stdout and "#SBATCH" in done.stdout
