"""Token choice and what goes with it on several ranks: equal to one process."""

from __future__ import annotations

import pytest
from cases import Case
from planned import differences
from ran import Ran
from records import first_records
from test_equality import TOLERANCE, Compared, compared, configuration, selected

from moesys.train import verify

EVERYTHING = {
    "moe": {
        "experts": 8,
        "top_k": 2,
        "gate": {
            "score": "sigmoid",
            "noise": "gaussian",
            "jitter": 0.1,
            "groups": 4,
            "groups_kept": 2,
            "group_score": "top2",
            "second": "random",
        },
        "balance_loss": 0.02,
        "sequence_balance_loss": 0.02,
        "global_balance_loss": 0.05,
        "importance_loss": 0.02,
        "bias_rate": 0.01,
    }
}
SCORES, FIRST = ({"moe": {**EVERYTHING["moe"], "balance_counts": counts}} for counts in ("scores", "first"))
NOISY = {"moe": {"experts": 8, "gate": {"noise": "gaussian"}, "load_loss": 0.05, "global_balance_loss": 0.05}}
CHOICE = {"moe": {"capacity_factor": 0.8, "drop": "choice", "top_k": 2, "normalize": False}}
PRIORITY = {"moe": {"capacity_factor": 0.8, "drop": "priority", "pad_to_capacity": True, "min_capacity": 3}}
# Of two layers: in later ones the gradients of how constant experts mix, which turn the stream alone, are so
# small that little but float32's rounding is left of them.
ZERO = {
    "layers": 2,
    "moe": {
        "top_k": 3, "zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "zero_tau": 0.75, "bias_rate": 0.01,
        "capacity_factor": 1.2,
    }
}  # fmt: skip
COSINE = {"moe": {"gate": "cosine", "experts": 8}}
PROTOTYPE = {"moe": {"gate": {"kind": "prototype", "bias": True, "noise": "gaussian"}, "experts": 8}}

CASES = [
    Case("everything-shard-tp-ep", 4, {"dp_shard": "full", "tp": 2, "ep": 2}, EVERYTHING),
    Case("everything-pp-accumulating", 4, {"pp": 2, "ep": 2}, SCORES, {"recompute": "selective"}),
    Case("everything-cp-full", 4, {"cp": 2, "ep": 2}, FIRST, {"recompute": "full", "micro_batch": 2}, batch=8),
    Case("noisy-shard-one-micro-batch", 4, {"dp_shard": "full", "tp": 2, "ep": 2}, NOISY, {"micro_batch": 4}, batch=8),
    Case("choice-cp-ep", 4, {"cp": 2, "ep": 4}, CHOICE),
    Case("priority-padded-cp-tp", 4, {"cp": 2, "tp": 2, "ep": 2}, PRIORITY, {"micro_batch": 2}, batch=8),
    Case("zero-tp-ep", 4, {"tp": 2, "ep": 2, "dp_shard": "full"}, ZERO, batch=8),
    Case("cosine-shard-tp", 4, {"dp_shard": "full", "tp": 2, "ep": 2}, COSINE),
    Case("prototype-tp-ep", 2, {"tp": 2, "ep": 2}, PROTOTYPE),
]


@pytest.fixture(scope="module")
def ran() -> dict[str, Ran]:
    return {}


@pytest.fixture(scope="module")
def routed(request, small, tmp_path_factory, ran) -> Compared:
    cases = selected(request, "test_equals_one_process", "test_does_what_its_budget_says", "test_moves_what_the_plan_says")
    return compared(small, cases, tmp_path_factory.mktemp("routed"), ran=ran)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(routed, case):
    report = verify.compare(*routed[case.name], case.world, TOLERANCE)
    assert report.passed, str(report)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_does_what_its_budget_says(routed, ran, case, budgets):
    budgets.check(case.name, ran[case.name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moves_what_the_plan_says(routed, ran, small, case):
    lines = differences(configuration(small, case), ran[case.name])
    assert not lines, "\n".join([f"{case.name} did not move what the dry run says:", *lines])


REPORTED = {
    "moe": {
        **NOISY["moe"], "zero_experts": 2, "capacity_factor": 0.8, "sequence_balance_loss": 0.01,
        "importance_loss": 0.1,
    }
}  # fmt: skip


def test_what_is_reported_is_the_same(small, tmp_path):
    """Every loss unscaled, and what was dropped or computed nothing, whatever the layout and the coefficients."""
    config = configuration(small, Case("reported", 4, {"tp": 2, "ep": 2}, REPORTED, {"recompute": "full"}, batch=8))
    found = first_records(config, 4, tmp_path / "four")
    alone = first_records(verify.reference(config), 1, tmp_path / "one")
    names = (
        "balance", "sequence_balance", "global_balance", "z", "importance", "load_loss", "dropped", "zero_share",
        "imbalance",
    )  # fmt: skip
    for ours, reference in zip(found, alone, strict=True):
        assert {name: ours[name] for name in names} == pytest.approx({n: reference[n] for n in names}, rel=1e-5)
    first = alone[0]
    # At the start routing is nearly even, where balance is 1; no coefficient is left in it.
    assert all(0.9 < first[name] < 1.2 for name in ("balance", "sequence_balance", "global_balance"))
    assert 0 < first["dropped"] < 0.5 and 0.1 < first["zero_share"] < 0.3
    assert 0.1 < first["importance"] < 1 and 0.001 < first["load_loss"] < 1
