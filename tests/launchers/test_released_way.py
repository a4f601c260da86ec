"""From released weights to released weights, by the commands of the README: import, train in one layout and go on in
another, export, generate, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from released import mixtral

from moesys.files import read_json
from moesys.train import checkpoint, manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("way")
    mixtral(folder / "mixtral", torch.bfloat16, num_hidden_layers=2)
    return folder


def moesys(place: Path, *words: str, given: str = "") -> str:
    """What a command prints; it must end well."""
    command = [sys.executable, "-m", "moesys", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=env, input=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_whole_way(place: Path, text: Path, small: dict):
    said = moesys(place, "import", "mixtral", "--to", "mine.yaml")
    assert "mine.yaml is written" in said

    own = yaml.safe_load((place / "mine.yaml").read_text())
    own["data"] = {"kind": "text", "path": str(text), "heldout": 0.2, "cache": small["data"]["cache"]}
    own["train"] |= {"steps": 3, "seq_len": 16, "global_batch": 8, "eval_sequences": 16}
    own |= {"launch": {"launcher": "local"}, "cluster": {"ranks_per_node": 4, "device": "cpu"}}
    own["output"] = {"tensorboard": False}
    (place / "run.yaml").write_text(yaml.safe_dump(own))

    moesys(place, "launch", "run.yaml", "parallel.tp=2", "parallel.ep=2")
    log = (place / "runs" / "run" / "logs" / "rank-0.log").read_text()
    assert "starting from the weights of" in log

    more = ["train.steps=5", "parallel.pp=2", "parallel.ep=2", "parallel.dp_shard=full"]
    more += ["output.export=hf", "output.export_checkpoints=true", "output.checkpoint_every=1", "output.keep=1"]
    moesys(place, "launch", "run.yaml", *more)
    summary = read_json(place / "runs" / "run" / "summary.json", "")
    assert summary["steps"] == 5
    kept, exported = ({path.name for path in (place / "runs/run" / f).iterdir()} for f in ("checkpoints", "export"))
    assert kept == exported == {"step-00000005"}
    log = (place / "runs" / "run" / "logs" / "rank-0.log").read_text()
    assert log.count("starting from the weights of") == 1, "the second launch goes on"

    said = moesys(place, "export", "runs/run", "--to", "out", "--dtype", "float32", "--shard-size", "50KB")
    assert "mixtral, 41 tensors" in said
    by_run = transformers.AutoModelForCausalLM.from_pretrained(place / "runs/run/export/step-00000005")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "out")
    newest = manifest.newest(place / "runs" / "run" / "checkpoints")
    assert newest is not None
    ids = torch.randint(320, (2, 16))
    with torch.no_grad():
        expected = checkpoint.model(newest)(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(by_run(ids).logits, expected, atol=1e-5, rtol=1e-5)

    greedy = ("--tokens", "12", "--temperature", "0", "--prompt", "def main(")
    texts = {moesys(place, "generate", model, *greedy) for model in ("runs/run", "out")}
    assert len(texts) == 1 and texts.pop().startswith("def main(")

    moesys(place, "eval", "runs/run", "--json", "run.json")
    shapes = ("data.heldout=0.2", "train.seq_len=16", "train.eval_sequences=16", "launch.launcher=local")
    moesys(place, "eval", "out", "--data", str(text), *shapes, "--json", "out.json")
    losses = [json.loads((place / name).read_text()) for name in ("run.json", "out.json")]
    assert losses[0]["texts"]["held-out"]["loss"] == pytest.approx(summary["heldout_loss"], rel=1e-5)
    assert losses[1]["texts"]
