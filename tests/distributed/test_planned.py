"""What a step moves, beside what the dry run says, in bfloat16 and with every kind of recomputation.

Routing is balanced by force: then exactly as many rows travel as planned.
"""

from __future__ import annotations

import json

import pytest
from batches import start
from cases import AHEAD, DROPPING, FULL, LATENT, NORMED, PLAIN, Case
from planned import differences
from planned_ranks import observed
from ran import Ran
from support import changed
from test_equality import selected

from moesys.config import Config
from moesys.parallel import dimension

BALANCED = {"moe": {"gate": {"kind": "top_k", "force": "balanced"}}}
LEVELS = {"kind": "hierarchical", "chunks": 2}
SHARED = {"moe": {"top_k": 3, "shared_experts": 1}}
CASES = [
    Case("tp", 2, {"tp": 2, "ep": 2}, LATENT),
    Case("tp selective", 2, {"tp": 2, "ep": 2}, DROPPING, {"recompute": "selective"}),
    Case("tp full", 2, {"tp": 2}, DROPPING, {"recompute": "full"}),
    Case("tp without sp", 2, {"tp": 2, "sp": False}, LATENT),
    Case("tp without sp selective", 2, {"tp": 2, "sp": False, "ep": 2}, DROPPING, {"recompute": "selective"}),
    Case("tp without sp full", 2, {"tp": 2, "sp": False}, NORMED, {"recompute": "full"}),
    Case("cp selective", 2, {"cp": 2, "ep": 2}, LATENT, {"recompute": "selective"}),
    Case("cp full", 2, {"cp": 2}, DROPPING, {"recompute": "full"}),
    Case("shard tp etp", 4, {**FULL, "tp": 2, "etp": 2}, LATENT, {"recompute": "selective"}),
    Case("shard tp full", 4, {**FULL, "tp": 2, "sp": False, "ep": 2}, LATENT, {"recompute": "full"}),
    Case("one micro-batch", 2, {**FULL, "ep": 2}, PLAIN, {"micro_batch": 2}, batch=4),
    Case("pp tp", 4, {"pp": 2, "tp": 2, "ep": 2}, DROPPING),
    Case("pp shard full", 4, {**FULL, "pp": 2, "ep": 2}, LATENT, {"recompute": "full"}),
    Case("ahead shard tp", 4, {**FULL, "tp": 2, "ep": 2}, AHEAD, {"recompute": "selective"}),
    Case("ahead tp without sp", 2, {"tp": 2, "sp": False}, AHEAD, {"recompute": "full"}),
    # Tokens choose so many experts that each node, and each rank, holds one of them: otherwise only the mean is known.
    Case("levels", 4, {"ep": 4, "dispatch": LEVELS}, {"moe": {"top_k": 4}}),
    Case("levels full", 4, {"ep": 4, "dispatch": LEVELS}, {"moe": {"top_k": 4}}, {"recompute": "full"}),
    Case("levels of slices", 4, {"tp": 2, "ep": 2, "etp": 2, "dispatch": LEVELS}, SHARED, {"recompute": "selective"}),
    Case("gathered", 4, {"ep": 2, "etp": 2, "dispatch": {"kind": "all_gather", "chunks": 2}}, LATENT),
]


def configuration(small: dict, case: Case) -> Config:
    more = {"model": case.model, "train": {**case.train, "dtype": "bfloat16"}, "parallel": case.parallel}
    nodes = 2 if case.parallel.get("dispatch", {}).get("kind") == "hierarchical" else 1
    cluster = {"nodes": nodes, "ranks_per_node": case.world // nodes}
    config = Config.model_validate(changed(small, case.size, more, {"model": BALANCED}, {"cluster": cluster}))
    assert (problems := dimension.check(config)) == [], problems
    return config


@pytest.fixture(scope="module")
def found(request, small, tmp_path_factory) -> dict[str, Ran]:
    """What one step of each case did."""
    folder, ran = tmp_path_factory.mktemp("planned"), {}
    cases = selected(request, "test_moves_what_the_plan_says")
    for world in sorted({case.world for case in cases}):
        configs = {case.name: configuration(small, case) for case in cases if case.world == world}
        place = folder / str(world)
        place.mkdir()
        start(observed, world, configs, place)
        ran |= {name: Ran(**json.loads((place / f"{name}.json").read_text())) for name in configs}
    return ran


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moves_what_the_plan_says(found, small, case):
    lines = differences(configuration(small, case), found[case.name])
    assert not lines, "\n".join([f"{case.name} did not move what the dry run says:", *lines])
