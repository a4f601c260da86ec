"""A dispatcher of another distribution with collectives of its own: one file, checked, planned and proved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import changed

ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, name: str, point: str) -> None:
    """Write what an installed distribution with one entry point leaves in `folder`."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[moesys.dispatchers]\n{point}\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a distribution with the toy dispatcher is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_dispatcher.py").write_text(Path(__file__).with_name("toy_dispatcher.py").read_text())
    install(folder, "toy_dispatcher", "table = toy_dispatcher:Table")
    return folder


@pytest.fixture(scope="module")
def file(small: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    change = {
        "model": {"layers": 2},
        "parallel": {"ep": 2, "dispatch": "table"},
        "cluster": {"ranks_per_node": 2},
        "train": {"steps": 1},
        "output": {"runs": str(folder)},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(changed(small, change)))
    return path


def moesys(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run([sys.executable, "-m", "moesys", *words], env=env, capture_output=True, text=True)


def test_it_is_a_word_where_it_is_installed(site, file):
    assert moesys(site, "config", str(file), "--check").returncode == 0
    wrong = moesys(site, "config", str(file), "--check", "parallel.dispatch=tabular")
    assert wrong.returncode == 2 and "did you mean table?" in wrong.stderr
    assert moesys(file.parent, "config", str(file), "--check").returncode == 2, "not installed: not a word"


def test_its_rules_are_checked(site, file):
    refused = moesys(site, "config", str(file), "--check", "parallel.dispatch={kind: table, chunks: 2}")
    assert refused.returncode == 2
    assert "must be 1: dispatch table sends a micro-batch at once" in refused.stderr


def test_its_traffic_is_planned(site, file, tmp_path):
    out = tmp_path / "plan.json"
    planned = moesys(site, "launch", str(file), "--dry-run", "--json", str(out))
    assert planned.returncode == 0, planned.stderr
    traffic = json.loads(out.read_text())["pipeline_ranks"][0]["traffic_per_step"]
    assert {name for name in traffic if name.endswith(" over ep")} == {"all_gather over ep", "reduce_scatter over ep"}


def test_it_computes_what_one_process_computes(site, file):
    done = moesys(site, "verify", str(file), "--steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
