"""What a step moves and keeps, beside what the dry run says, in bfloat16 and with every kind of recomputation.

Routing is balanced by force: then exactly as many rows travel as planned.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist
from batches import forget, join, start
from cases import DROPPING, FULL, LATENT, NORMED, PLAIN, Case
from planned import differences
from ran import Ran, observe
from support import changed
from test_equality import selected

from moesys.config import Config
from moesys.parallel import dimension

BALANCED = {"moe": {"gate": {"kind": "top_k", "force": "balanced"}}}
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
    Case("gathered", 4, {"ep": 2, "etp": 2, "dispatch": {"kind": "all_gather", "chunks": 2}}, LATENT),
]


def configuration(small: dict, case: Case) -> Config:
    more = {"model": case.model, "train": {**case.train, "dtype": "bfloat16"}, "parallel": case.parallel}
    config = Config.model_validate(
        changed(small, case.size, more, {"model": BALANCED}, {"cluster": {"ranks_per_node": case.world}})
    )
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
        start(_work, world, configs, place)
        ran |= {name: Ran(**json.loads((place / f"{name}.json").read_text())) for name in configs}
    return ran


def _work(rank: int, world: int, configs: dict[str, Config], folder: Path) -> None:
    from moesys.data.corpus import open_corpus
    from moesys.train.engine import engine_of
    from moesys.train.loop import Trainer

    join(rank, world, folder)
    for name, config in configs.items():
        mesh = engine_of(config).connect(config)
        trainer = Trainer(config, mesh, open_corpus(config))
        ran = observe(trainer)
        if ran is not None:
            (folder / f"{name}.json").write_text(json.dumps(asdict(ran)))
        del mesh, trainer
        forget()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moves_what_the_plan_says(found, small, case):
    lines = differences(configuration(small, case), found[case.name])
    assert not lines, "\n".join([f"{case.name} did not move what the dry run says:", *lines])
