"""Seeded mutations of what users write: a result, or an error with a message, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moesys.errors import MoesysError
from moesys.launchers.dry_run import plan
from moesys.launchers.sweep import Sweep
from moesys.train.validate import load_checked

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = (CONFIGS / "quickstart.yaml").read_text().replace("clusters/", f"{CONFIGS}/clusters/")
SWEEP = (CONFIGS / "sweeps" / "gates.yaml").read_text().replace("../quickstart", f"{CONFIGS}/quickstart")
SCRAPS = [
    "\0", "\ud800", "\t", "\n", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "|", ">", "'", '"', "#", "%",
    "@", "null", "true", "-1", "0", "1e309", ".nan", "9" * 400, "10**9", "1000000000", "~", "<<: *a", "?", "…",
    "\u202e", "x" * 300, "..", "$\\frac$", "\\u0000", '"\\0"', '"\\ud800"', "include: run.yaml", "---",
    "\ufeff", "\x85",
]  # fmt: skip
KEYS = [
    "model.layers", "model.moe", "model.moe.gate", "model.moe.experts", "parallel", "parallel.tp", "parallel.pp_split",
    "train.steps", "train.optimizer.betas", "data.path", "output.runs", "launch.env", "launch.slurm", "name", "seed",
    "cluster.nodes", "measure.steps", "nothing", "a.b.c", "", ".", "include", "model.attention.heads.x", "train",
]  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    """`text` with one to three places cut, doubled, or overwritten by a scrap."""
    for _ in range(rng.randint(1, 3)):
        begin = rng.randrange(len(text) + 1)
        end = min(len(text), begin + rng.choice((0, 0, 1, 5, 40)))
        text = text[:begin] + rng.choice(("", text[begin:end] * 2, *[rng.choice(SCRAPS)] * 4)) + text[end:]
    return text


def answer(path: Path, overrides: list[str]) -> str:
    try:
        plan(load_checked(path, overrides, with_data=False))
    except MoesysError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_configuration_is_answered(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "run.yaml"
    wrong = 0
    for _ in range(40):
        path.write_text(mutated(QUICKSTART, rng), encoding="utf-8", errors=rng.choice(("replace", "surrogatepass")))
        said = answer(path, [])
        assert len(said) < 20_000
        wrong += bool(said)
    assert wrong > 10


@pytest.mark.parametrize("seed", range(4))
def test_mutated_overrides_are_answered(seed):
    rng = random.Random(seed)
    wrong = 0
    for _ in range(40):
        given = [f"{rng.choice(KEYS)}={''.join(rng.choices(SCRAPS, k=rng.randint(0, 2)))}" for _ in range(2)]
        wrong += bool(answer(CONFIGS / "quickstart.yaml", [mutated(text, rng) for text in given]))
    assert wrong > 20


def test_a_mutated_sweep_is_answered(tmp_path):
    rng, path = random.Random(0), tmp_path / "two.yaml"
    wrong = 0
    for _ in range(15):
        path.write_text(mutated(SWEEP, rng), encoding="utf-8", errors=rng.choice(("replace", "surrogatepass")))
        try:
            Sweep.load(path, ["data.kind=huggingface", "data.path=nowhere"] if rng.random() < 0.5 else [])
        except MoesysError:
            wrong += 1
    assert wrong > 5


NAMES = ["$\\frac$d", "a\nb", "a/../b", "..", "-x", "x" * 300, "\x1b[31m", "a b", "ü", "{1}", "100%", "con.", ".", "名"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_makes_a_run_of_a_plain_one(tmp_path, name):
    """What a run's name cannot have becomes dashes; a name that no file has is told."""
    path = tmp_path / f"{name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(QUICKSTART)
    except OSError:
        assert "cannot be read" in answer(path, [])
        return
    config = load_checked(path, with_data=False)
    assert set(config.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") and config.name


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_legal_or_refused_with_the_rule(name):
    legal = name in ("con.",)
    said = answer(CONFIGS / "quickstart.yaml", [f"name='{name}'"])
    assert legal == (said == ""), said
    assert legal or "name" in said or "control character" in said
