"""A mixer, a gate, a dispatcher and a family of released models from outside of the package: they are found, checked,
planned, run and proved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TOY = Path(__file__).parent / "plugins"
ENTRY_POINTS = """
[moesys.parts]
gated_token = toy.gated_token:GatedToken
[moesys.gates]
in_turn = toy.in_turn:InTurn
[moesys.dispatchers]
table = toy.table:Table
[moesys.families]
toy_moe = toy.family:ToyMoe
"""
RUN = """
model:
  hidden: 32
  layers: {count: 2, repeat: [attention moe, tokens moe]}
  attention: {heads: 2}
  mixers: {tokens: {kind: gated_token, token_inner: 48}}
  moe: {experts: 4, ffn_hidden: 16, gate: {kind: in_turn, first: 1}, balance_loss: 0.0}
train: {steps: 2, seq_len: 16, global_batch: 4}
parallel: {ep: 2, tp: 2, dp_shard: full, dispatch: table}
cluster: {ranks_per_node: 2, device: cpu}
launch: {launcher: local}
"""


def installed(folder: Path, entry_points: str, *paths: Path) -> dict[str, str]:
    """The environment of a command for which a distribution with these entry points is installed in `folder`."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    path = os.pathsep.join([str(folder), *map(str, paths), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moesys", *arguments], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "run.yaml").write_text(RUN)
    return installed(folder, ENTRY_POINTS, TOY), folder


def test_the_schema_has_their_words_and_keys(toy):
    done = command(*toy, "config", "--schema")
    assert done.returncode == 0, done.stderr
    schema = json.dumps(json.loads(done.stdout))
    for word in ("gated_token", "token_inner", "in_turn", "table"):
        assert word in schema
    assert "each token by itself" in schema


def test_they_are_planned(toy):
    done = command(*toy, "launch", "run.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    moved = {
        words
        for words in ("all_gather over ep", "reduce_scatter over ep", "all_to_all over ep")
        if words in done.stdout
    }
    assert moved == {"all_gather over ep", "reduce_scatter over ep"}, "the dispatcher's own collectives"


def test_a_released_model_of_their_family_is_read(toy, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy_moe", "num_hidden_layers": 2, "mystery": 1}))
    save_file({"lm_head.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    environment, folder = toy
    done = command(environment, folder, "import", str(tmp_path))
    assert done.returncode == 2 and "mystery toy_moe files are not known to have it" in done.stderr, done.stderr


def test_they_equal_one_process(toy):
    done = command(*toy, "verify", "run.yaml", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("equal\n")


def test_their_keys_are_checked(toy):
    done = command(*toy, "launch", "run.yaml", "--dry-run", "model.mixers.tokens.token_inner=47")
    assert done.returncode == 2 and "tp(2) must divide model.mixers.tokens.token_inner(47)" in done.stderr
    done = command(*toy, "launch", "run.yaml", "--dry-run", "model.moe.gate={kind: in_turn, slots: 2}")
    assert done.returncode == 2 and "gate in_turn does not use it; soft do" in done.stderr
    done = command(*toy, "launch", "run.yaml", "--dry-run", "engine=megatron")
    assert done.returncode == 2 and "mixer gated_token is not in engine: megatron" in done.stderr
    done = command(*toy, "config", "run.yaml", "--check", "parallel.dispatch={kind: table, chunks: 2}")
    assert done.returncode == 2 and "must be 1: dispatch table sends a micro-batch at once" in done.stderr
    done = command(*toy, "config", "run.yaml", "parallel.dispatch=tabular")
    assert done.returncode == 2 and "did you mean table?" in done.stderr
    done = command(*toy, "config", "run.yaml", "model.moe.gate.kind=in_trun")
    assert done.returncode == 2 and "did you mean in_turn?" in done.stderr


BROKEN = {
    "a module that is missing": (
        "[moesys.gates]\nx = nowhere.gate:X\n",
        "moesys.gates: x = nowhere.gate:X of toy 1.0",
    ),
    "no description": ("[moesys.gates]\nx = json:dumps\n", "names no description"),
    "a word that is taken": (
        "[moesys.gates]\nx = moesys.models.parts.gates.soft:Soft\n",
        "brings gates soft, as moesys.",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plug_in_is_one_message(name, tmp_path):
    entry_points, said = BROKEN[name]
    done = command(
        installed(tmp_path, entry_points),
        tmp_path,
        "config",
        str(Path(__file__).parents[1] / "configs/quickstart.yaml"),
    )
    assert done.returncode != 0 and said in done.stderr and "remedy" in done.stderr
    assert "Traceback" not in done.stderr
