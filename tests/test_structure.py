"""The structure of the repository: floors of imports, and one name for every module."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from moesys.config.registry import DISPATCHERS, GATES, kinds

ROOT = Path(__file__).resolve().parents[1]


def test_floors_are_kept():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint, "--config", "pyproject.toml", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def modules(root: Path, package: str) -> dict[str, Path]:
    """All modules of a package by their full names; its links to folders are followed."""
    found = {}
    for folder, _, files in os.walk(root / package, followlinks=True):
        for file in files:
            name = ".".join(Path(folder, file).relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if file.endswith(".py"):
                found[name] = Path(folder, file)
    return found


def imports(source: str, known: set[str]) -> Iterator[str]:
    """The modules among `known` that a source imports, inside functions and for types alone too."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in full]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name in known)


def circle(paths: dict[str, Path]) -> list[str]:
    """Modules that import one another in a circle; [] if there is none."""
    graph = {name: {n for n in imports(path.read_text(), set(paths)) if n != name} for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_modules_import_one_another_in_a_circle():
    paths = modules(ROOT, "moesys")
    assert len(paths) > 200 and circle(paths) == []


def test_a_circle_through_lazy_and_type_only_imports_is_found(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.py").write_text("if TYPE_CHECKING:\n    from p.b import B\n")
    (tmp_path / "p" / "b.py").write_text("def f():\n    from p import c\n")
    (tmp_path / "p" / "c.py").write_text("import p.a\n")
    (tmp_path / "p" / "d.py").write_text("import p.a, os\n")
    assert set(circle(modules(tmp_path, "p"))) == {"p.a", "p.b", "p.c"}


@pytest.mark.parametrize("name", ["parallel", "kernels", "launchers", "benchmarks"])
def test_folders_are_imported_by_the_package_name_alone(name):
    result = subprocess.run([sys.executable, "-c", f"from {name} import x"], cwd=ROOT, capture_output=True, text=True)
    assert f"import moesys.{name}, not {name}" in result.stderr
    subprocess.run([sys.executable, "-c", f"import moesys.{name}"], cwd=ROOT, check=True)


def test_transformers_is_imported_from_the_repository_root():
    """It looks for a package `kernels`, and finds the folder."""
    code = "import importlib.util, kernels; from transformers.utils.import_utils import is_kernels_available as found; "
    code += "assert not found() and importlib.util.find_spec('kernels.choose') is None"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


LACKING = ("torch", "ray", "megatron", "transformers", "triton")
"""What a machine need not have that only reads configurations and data, plans and submits."""

WITHOUT_TORCH = ("config", "data", "launchers.launch", "launchers.slurm", "launchers.dry_run", "launchers.what_if")
WITHOUT_TORCH += ("parallel.dimension", "parallel.cost", "parallel.memory", "models.size", "train.validate", "cli")


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


def test_a_gate_is_found_by_its_word():
    """It is described and computed in files of its name; so are dispatchers described."""
    for slot in (GATES, DISPATCHERS):
        for kind, described in kinds(slot).items():
            assert described.__module__ == f"{slot.package}.{kind}"
    rooms = [
        {path.stem for path in (ROOT / "moesys" / room / "gates").glob("*.py")} for room in ("models/parts", "moe")
    ]
    assert set(kinds(GATES)) <= rooms[0] & rooms[1]
