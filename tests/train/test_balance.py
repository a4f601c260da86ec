"""Collapsed routers are told, with the step since which; healthy ones, and those that only begin, are not."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import yaml
from support import changed

from moesys.config.schema import Config
from moesys.train.balance import WINDOW, BalanceWatch, Fault, sentence

BASE: dict[str, Any] = {
    "model": {"hidden": 8, "layers": 2, "moe": {"experts": 4, "top_k": 2, "ffn_hidden": 8}},
    "train": {"steps": 100, "seq_len": 64, "global_batch": 8},
}
TOKENS = 512
EVEN = [256, 256, 256, 256]
COLLAPSED = [512, 0, 509, 3]


def watch(*changes: dict[str, Any]) -> BalanceWatch:
    return BalanceWatch(Config.model_validate(changed(BASE, *changes)))


def told(found: BalanceWatch, loads: list[list[list[float]]]) -> dict[int, list[Fault]]:
    """What is told, by the step that tells it."""
    return {step: faults for step, load in enumerate(loads, 1) if (faults := found.take(step, load))}


def test_a_collapsed_router_is_told_once_with_its_first_step():
    found = watch()
    faults = told(found, [[EVEN, EVEN]] * 5 + [[EVEN, COLLAPSED]] * 60)
    expected = [Fault("layers.1", "collapsed", (0, 2), 6), Fault("layers.1", "dead", (1,), 6)]
    assert faults == {5 + WINDOW: expected}
    assert found.faults() == expected
    assert found.counts() == {"dead_experts": 1, "collapsed_layers": 1}
    assert sentence(expected) == (
        "layers.1: experts 0, 2 each get at least 95% of all tokens since step 6; "
        "layers.1: no token for expert 1 since step 6"
    )


def test_a_run_of_few_steps_tells_what_held_in_all_of_them():
    assert [f.since for f in told(watch({"train": {"steps": 4}}), [[COLLAPSED, EVEN]] * 4)[4]] == [1, 1]


def test_experts_that_wake_up_are_well_again():
    found = watch()
    told(found, [[COLLAPSED, EVEN]] * WINDOW + [[EVEN, EVEN]])
    assert found.faults() == [] and found.counts() == {"dead_experts": 0, "collapsed_layers": 0}


def test_nothing_is_told_before_the_warm_up_ends():
    found = watch({"train": {"schedule": {"warmup": 60}}})
    assert [*told(found, [[COLLAPSED, EVEN]] * 90)] == [61]


def test_few_tokens_prove_nothing():
    """64 experts, 8 assignments a step: some get nothing in fifty steps, by chance alone."""
    found = watch({"model": {"layers": 1, "moe": {"experts": 64, "top_k": 1}}})
    draw = np.random.default_rng(0)
    loads = [[np.bincount(draw.integers(0, 64, 8), minlength=64).tolist()] for _ in range(100)]
    assert told(found, loads) == {}


def test_uneven_is_not_collapsed():
    """An expert with 94% of the tokens, and one with a hundredth of the mean load."""
    assert told(watch(), [[[481, 270, 270, 3], EVEN]] * 100) == {}


@pytest.mark.parametrize("gate", ["dense", "soft", "smear", "expert_choice"])
def test_gates_without_balance_are_left_alone(gate):
    found = watch({"model": {"moe": {"gate": gate}}})
    assert told(found, [[COLLAPSED, COLLAPSED]] * 60) == {} and found.counts() == {}


@pytest.mark.parametrize("top_k, load", [(4, [TOKENS] * 4), (3, [TOKENS, TOKENS, 256, 256])])
def test_many_of_few_experts_are_no_collapse(top_k, load):
    assert told(watch({"model": {"moe": {"top_k": top_k}}}), [[load] * 2] * 60) == {}


def test_dense_models_have_no_routers():
    config = Config.model_validate({"model": {"hidden": 8, "layers": 1, "ffn_hidden": 8}})
    found = BalanceWatch(config)
    assert found.take(1, None) == [] and found.counts() == {} and found.as_json() == {}


def test_resumption_remembers_since_when():
    first = watch()
    assert told(first, [[COLLAPSED, EVEN]] * 10) == {}
    second = watch()
    second.restore(10, json.loads(json.dumps(first.as_json())))
    for step in range(11, WINDOW + 1):
        faults = second.take(step, [COLLAPSED, EVEN])
    assert [fault.since for fault in faults] == [1, 1]


def test_long_lists_are_cut():
    text = sentence([Fault(f"layers.{i}", "dead", tuple(range(12)), 3) for i in range(6)])
    assert "experts 0, 1, 2, 3, 4, 5, 6, 7 and 4 more" in text and text.endswith("; and 2 more")


def test_a_run_tells_it_everywhere(small, tmp_path):
    """Of 64 experts that a hash of bytes chooses, some get bytes that the text does not have."""
    change = {
        "model": {"hidden": 16, "layers": 1, "moe": {"experts": 64, "top_k": 1, "gate": "hash"}},
        "train": {"steps": 40, "seq_len": 256, "global_batch": 8, "micro_batch": 8, "eval_sequences": 8},
        "output": {"runs": str(tmp_path), "tensorboard": False},
    }
    raw = changed(small, {"model": {"moe": {"balance_loss": 0.0, "z_loss": 0.0}}}, change)
    (tmp_path / "hash.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "moesys.cli", "launch", str(tmp_path / "hash.yaml"), "--launcher", "local"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "hash"
    summary = json.loads((run / "summary.json").read_text())
    loads = [json.loads(line)["load"][0] for line in (run / "load.jsonl").read_text().splitlines()]
    dead = np.flatnonzero(np.sum(loads, 0) == 0).tolist()
    (fault,) = summary["routing_faults"]
    assert dead and fault == {"layer": "layers.0", "kind": "dead", "experts": dead, "since": fault["since"]}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record for record in records if "loss" in record}
    assert [steps[step]["dead_experts"] for step in (1, 39, 40)] == [0, 0, len(dead)]
    assert [record["step"] for record in records if "warning" in record] == [40]
    first = f"layers.0: no token for expert{'s' * (len(dead) > 1)} {dead[0]}"
    assert f"step 40: {first}" in ended.stdout and f"dead experts {len(dead)}" in ended.stdout
    assert summary["routing"].startswith(first) and "│ routing" in ended.stdout
