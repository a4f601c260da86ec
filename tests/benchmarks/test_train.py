"""The benchmark of training runs both sides; its figures are for docs, not for tests."""

from __future__ import annotations

import sys

import pytest
from support import changed

from moesys import comparisons
from moesys.benchmarks import mixtral, train
from moesys.config import Config
from moesys.errors import MoesysError
from moesys.train import verify


def test_both_sides_train(small):
    config = verify.reference(Config.model_validate(changed(small, {"model": {"layers": 1}})))
    speeds = train.compare(config, rounds=2, steps=1)
    assert set(speeds) == {"moesys", "transformers"}
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in speeds.values())


def test_the_result_is_told_line_by_line():
    result = train.Result(2000.0, 1000.0, 2.0, 7, 5, {"local": 3.14}, "a machine", "a day")
    assert result.lines() == [
        "a machine, a day",
        "  medians of 7 interleaved rounds of 5 steps",
        "  moesys             2,000 tokens/s, one process",
        "  transformers       1,000 tokens/s, the same shape and batches",
        "  ratio               2.00",
        "  local  from command to first step    3.1 s",
    ]


@pytest.mark.parametrize(
    "model", [{"moe": {"shared_experts": 1}}, {"ffn_hidden": 8, "moe": {"every": 2}}], ids=["shared experts", "dense"]
)
def test_a_model_that_mixtral_cannot_be_is_refused(small, model):
    with pytest.raises(MoesysError, match=r"compares with Mixtral: every layer MoE.*\n.*remedy: configs/quickstart"):
        mixtral.check(Config.model_validate(changed(small, {"model": model})))


def test_a_system_that_is_not_installed_is_one_message(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MoesysError, match=r"compares with transformers, which is not installed\n.*remedy: pip install"):
        mixtral.check(Config.model_validate(small))


def test_an_installation_without_comparisons_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, comparisons.PACKAGE, None)
    assert comparisons.found("train") is None
    with pytest.raises(MoesysError, match=r"bench train compares with another system.*\n.*remedy: in a checkout"):
        comparisons.demanded("train", "bench train")


def test_a_fault_inside_of_a_comparison_is_not_hidden():
    with pytest.raises(ModuleNotFoundError, match="no_such_comparison"):
        comparisons.found("no_such_comparison")
