"""The dry run: what would be started, told in a moment."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moesys import cli
from moesys.launchers.dry_run import KINDS, show
from moesys.train.validate import load_checked

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LARGE = [
    "cluster.nodes=512", "train.global_batch=4096", "parallel.dp=auto", "parallel.tp=8", "parallel.pp=8",
    "parallel.ep=8", "parallel.pp_schedule=1f1b", "parallel.pp_virtual=1",
]  # fmt: skip


def test_4096_ranks_are_planned_without_torch(tmp_path):
    out = tmp_path / "plan.json"
    words = ["launch", str(CONFIGS / "mixtral-8x7b-16x8gpu.yaml"), "--dry-run", "--json", str(out), *LARGE]
    program = f"import sys; from moesys import cli; sys.exit(cli.main({words!r}) or 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads(out.read_text())
    assert facts["world_size"] == 4096 and len(facts["nodes"]) == 512
    for members in facts["groups"].values():
        assert sorted(rank for group in members for rank in group) == list(range(4096))
    assert facts["dense_mesh"]["tp"] == 8 and facts["expert_mesh"]["ep"] == 8
    assert facts["parameters"] == 46_702_792_704
    # Eight ranks of a node are one tensor group: with ep 8 they are one expert group as well.
    assert facts["groups"]["tensor"][0] == facts["groups"]["experts (ep · etp)"][0] == list(range(8))
    assert "4096 ranks on 512 nodes" in result.stdout and "nothing was started" in result.stdout


def test_the_quickstart_is_shown_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", str(CONFIGS / "quickstart.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("pp 2 × dp_replicate 2", "ep 2", "all_to_all over ep", "embedding + layers 0–1", "parameters"):
        assert part in out, part
    assert list(tmp_path.iterdir()) == []


QUICKSTART = str(CONFIGS / "quickstart.yaml")


@pytest.mark.parametrize(
    ("given", "code"), [((), 0), (("cluster.memory_gib=1",), 0), (("cluster.memory_gib=0.001",), 3)]
)
def test_scripts_learn_by_the_exit_code_whether_memory_fits(tmp_path, capsys, given, code):
    out = tmp_path / "plan.json"
    assert cli.main(["launch", QUICKSTART, "--dry-run", "--json", str(out), *given]) == code
    shown = capsys.readouterr().out
    assert json.loads(out.read_text())["fits"] == {0: True if given else None, 3: False}[code]
    assert cli.main(["config", QUICKSTART, "--check", *given]) == code
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("quickstart: legal on 4 ranks; ")
    assert ("DOES NOT FIT" in line) == ("DOES NOT FIT" in shown) == (code == 3)


def test_what_is_not_legal_has_the_code_of_wrong_input(capsys):
    assert cli.main(["config", QUICKSTART, "--check", "cluster.memory_gib=0.001", "parallel.dp=3"]) == 2
    assert "parallel.dp is 3" in capsys.readouterr().err


def test_a_batch_script_has_the_same_facts_and_code(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["launch", QUICKSTART, "--launcher", "slurm", "--dry-run", "--json", str(out)]
    assert cli.main([*words, "cluster.memory_gib=0.001"]) == 3
    shown = capsys.readouterr()
    assert shown.out.startswith("#!/bin/bash") and "DOES NOT FIT" not in shown.out
    assert "DOES NOT FIT" in shown.err and json.loads(out.read_text())["world_size"] == 4


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_json_without_a_dry_run_is_refused(capsys, tmp_path, launcher):
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", QUICKSTART, "--launcher", launcher, "--json", str(tmp_path / "plan.json")])
    assert stop.value.code == 2 and "--json goes with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-16x8gpu.yaml")), ids=lambda path: path.stem)
def test_eighty_columns_cut_no_heading(path):
    console = Console(width=80, file=io.StringIO())
    show(load_checked(path, with_data=False), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line for line in lines if line.startswith("┃")]
    words = {head.strip() for line in heads for head in line.strip("┃").split("┃")}
    assert {"pp rank", "members", "parameters", "collective", "calls", *KINDS, "total"} <= words


def test_on_cpu_memory_is_that_of_a_node(capsys):
    words = ["launch", str(CONFIGS / "quickstart.yaml"), "--dry-run"]
    shares = []
    for device in ("cpu", "cuda"):
        assert cli.main([*words, f"cluster.device={device}", "cluster.memory_gib=1"]) == 0
        line = next(text for text in capsys.readouterr().out.splitlines() if "memory of the fullest" in text)
        assert f"fullest {'node' if device == 'cpu' else 'rank'}" in line
        shares.append(int(line.split(":")[1].split("%")[0]))
    assert 2 * shares[1] < shares[0] <= 4 * shares[1] + 4
