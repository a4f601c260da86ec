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


def test_both_sides_do_the_same_work(small):
    """Equal losses of several steps prove equal shapes, routing, learning rates and optimizers."""
    warm = {"optimizer": {"lr": 3e-3, "clip": 0.5}, "schedule": {"warmup": 4}, "global_batch": 4, "micro_batch": 2}
    # Theirs balances all layers together, and not each.
    model = {"layers": 2, "moe": {"balance_loss": 0.0}}
    config = verify.reference(Config.model_validate(changed(small, {"model": model, "train": warm})))
    with train.sides(config) as both:
        losses = {name: [step() for _ in range(4)] for name, step in both.items()}
    assert losses["moesys"] == pytest.approx(losses["transformers"], rel=2e-5)
    assert losses["moesys"][0] - losses["moesys"][-1] > 0.05


def test_losses_that_mixtral_lacks_are_off_on_both_sides(small):
    config = Config.model_validate(changed(small, {"model": {"moe": {"sequence_balance_loss": 0.1}}}))
    moe = mixtral.comparable(config).model.moe
    assert (moe.z_loss, moe.sequence_balance_loss, moe.balance_loss) == (0.0, 0.0, 0.02)
    assert config.model.moe.z_loss == 0.001


def test_the_result_is_told_line_by_line():
    result = train.Result(2000.0, 1000.0, 2.0, 7, 5, {"local": 3.14}, "a machine", "a day")
    assert result.lines() == [
        "a machine, a day",
        "  medians of 7 interleaved rounds of 5 steps",
        "  moesys             2,000 tokens/s, one process",
        "  transformers       1,000 tokens/s, the same weights, batches and losses",
        "  ratio               2.00",
        "  local  from command to first step    3.1 s",
    ]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model": {"moe": {"shared_experts": 1}}}, r"; model\.moe\.shared_experts is 1"),
        ({"model": {"ffn_hidden": 8, "moe": {"every": 2}}}, r"; model\.moe\.every is 2"),
        ({"model": {"moe": {"normalize": False}}}, r"; model\.moe\.normalize is false"),
        ({"model": {"moe": {"gate": {"score": "sigmoid"}}}}, r"; model\.moe\.gate\.score is \"sigmoid\""),
        ({"train": {"dtype": "bfloat16"}}, r"; train\.dtype is \"bfloat16\""),
        ({"model": {"moe": None, "ffn_hidden": 8}}, ""),
    ],
    ids=["shared experts", "dense layers", "weights", "gate", "type", "dense"],
)
def test_a_model_that_mixtral_cannot_be_is_refused(small, change, found):
    rule = rf"compares with Mixtral in float32: every layer MoE.*{found}\n.*remedy: configs/quickstart"
    with pytest.raises(MoesysError, match=rule):
        mixtral.check(Config.model_validate(changed(small, change)))


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
