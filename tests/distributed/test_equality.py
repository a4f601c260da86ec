"""`moesys verify` over a matrix that covers every pair of dimensions, and what a step of each case may do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from batches import Prepare, traces
from budgets import Budgets
from cases import MORE, PAIRS, Case
from planned import differences
from ran import Ran
from sabotage import (
    forbid_outputs_of_a_pipeline,
    forget_the_experts,
    gather_and_wait_too_often,
    send_everything_to_the_first_expert,
)
from support import changed

from moesys import cli
from moesys.config import Config
from moesys.parallel import dimension
from moesys.train import verify

STEPS, TOLERANCE = 2, 1e-5

Compared = dict[str, tuple[verify.Trace, verify.Trace]]
"""By the names of cases: what they compute, and what one process does."""


def configuration(small: dict, case: Case) -> Config:
    more = {"model": case.model, "train": case.train, "parallel": case.parallel}
    raw = changed(small, case.size, more, {"cluster": {"ranks_per_node": case.world}})
    config = Config.model_validate(raw)
    assert dimension.check(config) == []
    return config


def compared(
    small: dict,
    cases: Sequence[Case],
    folder: Path,
    prepare: Prepare = None,
    ran: dict[str, Ran] | None = None,
) -> Compared:
    """All cases and their references, which cases of one model share; `ran` gets what a step of each case does."""
    configs = {case.name: configuration(small, case) for case in cases}
    alone = {name: verify.reference(config) for name, config in configs.items()}
    keys = {name: json.dumps(config.model_dump(), sort_keys=True) for name, config in alone.items()}
    runs = {case.name: (configs[case.name], case.world) for case in cases}
    runs |= {keys[name]: (config, 1) for name, config in alone.items()}
    found = traces(runs, STEPS, folder, prepare, ran)
    return {name: (found[name], found[keys[name]]) for name in configs}


def selected(request: pytest.FixtureRequest, *functions: str) -> list[Case]:
    """The cases of tests of this module that are to run."""
    items = [item for item in request.session.items if item.path == request.path]
    cases = [item.callspec.params["case"] for item in items if getattr(item, "originalname", "") in functions]
    return list({case.name: case for case in cases}.values())


@pytest.fixture(scope="module")
def ran() -> dict[str, Ran]:
    return {}


@pytest.fixture(scope="module")
def pairs(request, small, tmp_path_factory, ran) -> Compared:
    cases = selected(
        request, "test_equals_one_process", "test_does_what_its_budget_says", "test_moves_what_the_plan_says"
    )
    return compared(small, cases, tmp_path_factory.mktemp("pairs"), forbid_outputs_of_a_pipeline, ran)


@pytest.mark.parametrize("case", PAIRS + MORE, ids=lambda case: case.name)
def test_equals_one_process(pairs, case):
    report = verify.compare(*pairs[case.name], case.world, TOLERANCE)
    assert report.passed, str(report)


@pytest.mark.parametrize("case", PAIRS + MORE, ids=lambda case: case.name)
def test_does_what_its_budget_says(pairs, ran, case, budgets):
    budgets.check(case.name, ran[case.name])


@pytest.mark.parametrize("case", PAIRS + MORE, ids=lambda case: case.name)
def test_moves_what_the_plan_says(pairs, ran, small, case):
    lines = differences(configuration(small, case), ran[case.name])
    assert not lines, "\n".join([f"{case.name} did not move what the dry run says:", *lines])


def test_a_gather_and_a_wait_too_many_are_found(small, tmp_path):
    case = next(case for case in PAIRS if case.name == "shard-ep")
    ran: dict[str, Ran] = {}
    traces({case.name: (configuration(small, case), case.world)}, 1, tmp_path, gather_and_wait_too_often, ran)
    budget = Budgets().written[case.name]["collectives"]
    with pytest.raises(AssertionError) as failure:
        Budgets().check(case.name, ran[case.name])
    text = str(failure.value)
    assert f"and the budget is {budget['all_gather over dp_shard']}" in text
    assert "tests/distributed/sabotage.py: 1, and the budget is none" in text
    lines = differences(configuration(small, case), ran[case.name])
    assert any(line.strip().startswith("all_gather ") and "and 7 calls" in line for line in lines), lines


def test_the_matrix_covers_every_pair_of_dimensions():
    covered = set()
    for case in PAIRS + MORE:
        p = case.parallel
        used = {axis for axis in ("tp", "cp", "pp", "ep", "etp") if p.get(axis, 1) > 1}
        dp = case.world // (p.get("tp", 1) * p.get("cp", 1) * p.get("pp", 1))
        shard = dp if p.get("dp_shard") == "full" else p.get("dp_shard", 1)
        used |= ({"shard"} if shard > 1 else set()) | ({"replicate"} if dp // shard > 1 else set())
        covered |= set(combinations(sorted(used), 2))
    every = combinations(sorted(("tp", "cp", "pp", "ep", "etp", "shard", "replicate")), 2)
    assert set(every) <= covered


def test_a_broken_rule_is_found(small):
    config = configuration(small, Case("broken", 4, {"ep": 2}))
    found = verify.trace(config, 4, STEPS, prepare=forget_the_experts)
    report = verify.compare(found, verify.trace(verify.reference(config), 1, STEPS), 4, TOLERANCE)
    assert not report.passed
    assert report.gradient.value > 0.1
    assert "experts" in report.gradient.where


STARVING = [
    Case("ep", 4, {"ep": 4}, {"moe": {"top_k": 1, "normalize": False}}),
    Case("shard-ep", 4, {"dp_shard": "full", "ep": 2}, {"moe": {"top_k": 1, "normalize": False}}),
    Case("pp-tp-ep", 4, {"pp": 2, "tp": 2, "ep": 2}, {"moe": {"top_k": 1, "normalize": False}}),
    Case(
        "zero-bubble-ep", 4, {"pp": 2, "pp_schedule": "zero-bubble", "ep": 2}, {"moe": {"top_k": 1, "normalize": False}}
    ),
    Case("ep-etp-recompute", 4, {"ep": 2, "etp": 2}, {"moe": {"top_k": 1, "normalize": False}}, {"recompute": "full"}),
]


@pytest.fixture(scope="module")
def starving(request, small, tmp_path_factory) -> Compared:
    cases = selected(request, "test_ranks_without_tokens_change_nothing")
    return compared(small, cases, tmp_path_factory.mktemp("starving"), send_everything_to_the_first_expert)


@pytest.mark.parametrize("case", STARVING, ids=lambda case: case.name)
def test_ranks_without_tokens_change_nothing(starving, case):
    found, expected = starving[case.name]
    report = verify.compare(found, expected, case.world, TOLERANCE)
    assert report.passed, str(report)
    for name, gradient in found.gradients[0].items():
        if ".experts." in name:
            assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0, name


def test_the_command_reports_and_writes_json(small, tmp_path, capsys):
    raw = changed(small, {"cluster": {"ranks_per_node": 2}, "parallel": {"ep": 2}})
    path = tmp_path / "ep.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert cli.main(["verify", str(path), "--steps", "1", "--json", str(tmp_path / "out.json")]) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["passed"] and told["gradient"]["value"] < 1e-5 and told["gradient"]["where"]
    assert "equal" in capsys.readouterr().out
    # Rounding differs between layouts: no tolerance below it can be met.
    assert cli.main(["verify", str(path), "--steps", "1", "--tolerance", "1e-12"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
