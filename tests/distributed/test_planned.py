"""What a step moves and keeps, beside what the dry run says, in bfloat16 and with every kind of recomputation.

Routing is balanced by force: then exactly as many rows travel as planned.
"""

from __future__ import annotations

import json

import pytest
from batches import start
from cases import AHEAD, DROPPING, FULL, LATENT, NORMED, PLAIN, Case
from planned import differences
from planned_ranks import kept_of_each, observed
from ran import Ran
from support import changed
from test_equality import selected

from moesys.config import Config
from moesys.data.corpus import vocab_size
from moesys.parallel import dimension
from moesys.parallel.activations import activations
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape

LAYOUTS = {
    "tp": {"tp": 2},
    "tp without sp": {"tp": 2, "sp": False},
    "cp": {"cp": 2},
    "shards": {"dp_shard": "full"},
    "ep": {"ep": 2},
    "tp ep": {"tp": 2, "ep": 2},
}
MODELS: dict[str, dict] = {
    "dense": {"ffn_hidden": 512, "attention": {"heads": 4, "kv_heads": 2}},
    "moe": {
        "attention": {"heads": 4, "kv_heads": 4},
        "moe": {"experts": 4, "ffn_hidden": 128, "shared_experts": 1, "gate": {"kind": "top_k", "force": "balanced"}},
    },
    "latent": {"ffn_hidden": 512, "attention": {**LATENT["attention"], "q_lora_rank": 64, "kv_lora_rank": 64}},
    "ahead": {"ffn_hidden": 512, "attention": {"heads": 4, "kv_heads": 2}, "mtp": {"depth": 2}},
    "released": {
        "ffn_hidden": 512,
        "rope_scaling": {"kind": "linear", "factor": 2.0},
        "attention": {"heads": 4, "kv_heads": 2, "sinks": True, "bias": "qkv", "rotary_fraction": 0.5},
    },
    "windows": {"ffn_hidden": 512, "attention": {"heads": 4, "kv_heads": 2, "window": 16}},
}
KEPT = [
    (model, layout, dtype, recompute)
    for model in MODELS
    for layout in LAYOUTS
    for dtype in ("float32", "bfloat16")
    for recompute in ("none", "full")
    if (model == "moe" or (layout in ("tp", "tp without sp", "cp") and recompute == "none"))
    and not (recompute == "full" and dtype == "float32")
]
"""What autograd keeps is asked of these; what selective recomputation keeps it does not say."""

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
    Case("ahead shard tp", 4, {**FULL, "tp": 2, "ep": 2}, AHEAD, {"recompute": "selective"}),
    Case("ahead tp without sp", 2, {"tp": 2, "sp": False}, AHEAD, {"recompute": "full"}),
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
        start(observed, world, configs, place)
        ran |= {name: Ran(**json.loads((place / f"{name}.json").read_text())) for name in configs}
    return ran


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moves_what_the_plan_says(found, small, case):
    lines = differences(configuration(small, case), found[case.name])
    assert not lines, "\n".join([f"{case.name} did not move what the dry run says:", *lines])


def kept_by(small: dict, model: str, layout: str, dtype: str, recompute: str, world: int = 2) -> Config:
    raw = changed(
        small,
        {"model": {"hidden": 256, "layers": 2}, "parallel": LAYOUTS[layout], "cluster": {"ranks_per_node": world}},
        {"train": {"seq_len": 128, "micro_batch": 2, "global_batch": 4, "dtype": dtype, "recompute": recompute}},
    )
    raw["model"] = {**raw["model"], "moe": None, **MODELS[model]}
    config = Config.model_validate(raw)
    assert (problems := dimension.check(config)) == [], problems
    return config


@pytest.fixture(scope="module")
def remains(small, tmp_path_factory) -> list[dict[str, int]]:
    """What rank 0 keeps of one micro-batch of each of `KEPT`, by type and shape."""
    folder = tmp_path_factory.mktemp("kept")
    start(kept_of_each, 2, [kept_by(small, *names) for names in KEPT], folder)
    return json.loads((folder / "kept.json").read_text())


@pytest.mark.parametrize("names", KEPT, ids=" ".join)
def test_keeps_what_the_estimate_says(remains, small, names):
    config, sizes = kept_by(small, *names), remains[KEPT.index(names)]
    degrees, _ = resolve(config)
    estimate, measured = activations(step_shape(config, degrees, vocab_size(config), 0)), sum(sizes.values())
    largest = "\n".join(f"    {size:10} bytes of {name}" for name, size in sorted(sizes.items(), key=lambda x: -x[1]))
    assert estimate == pytest.approx(measured, rel=0.1), f"estimated {estimate:.0f}, kept {measured}:\n{largest}"
