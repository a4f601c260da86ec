"""Predictions compared with sums by hand, on links without latency."""

from __future__ import annotations

from typing import Any

import pytest

from moesys.config.schema import Config
from moesys.measure.predict.links import LinkModel, Profile, ProfileError
from moesys.measure.predict.settings import WhatIfError, variants
from moesys.measure.predict.what_if import Predictor
from moesys.measure.step import CollectiveSpan, RankStep, Step

BASE: dict[str, dict[str, Any]] = {
    "model": {
        "hidden": 8,
        "layers": 1,
        "attention": {"heads": 2},
        "moe": {"experts": 8, "top_k": 4, "ffn_hidden": 8},
    },
    "parallel": {"ep": 4},
    "train": {"seq_len": 16, "global_batch": 4, "micro_batch": 1},
    "cluster": {"nodes": 2, "ranks_per_node": 2},
    "launch": {"launcher": "hosts", "link_gbit": 1.0},
}
"""Two nodes of two ranks; in each step every rank sends 16 tokens to 4 experts each."""

VOCABULARY = 64


def line(bandwidth: float) -> LinkModel:
    return LinkModel(0.0, 1 / bandwidth, 0.0, 0.0, 1, 1e9)


PROFILE = Profile(
    {
        "all_to_all intra": line(1e9),
        "all_to_all inter": line(1e5),
        "all_reduce world": line(1e9),
        "all_reduce inter": line(1e6),
    },
    {},
)

EXPOSED, DATA, STEP = 0.5, 0.1, 1.0
LOADS = [[40.0, 40.0, 40.0, 40.0, 24.0, 24.0, 24.0, 24.0]]


def config(**changes: dict[str, Any]) -> Config:
    raw = {**BASE, **{key: {**BASE[key], **value} for key, value in changes.items()}}
    return Config.model_validate(raw)


def recorded_step() -> Step:
    """A recorded step of a second, in which every rank waits 0.5 s for rows and 0.1 s for gradients."""
    group = (0, 1, 2, 3)
    rows = CollectiveSpan(
        "all_to_all", "expert", group, 0, 0.1, 0.1, 0.1 + EXPOSED, 80, (20,) * 4, "layers.0", "dispatch"
    )
    gradients = CollectiveSpan("all_reduce", "data", group, 0, 0.8, 0.8, 0.8 + DATA, 80)
    ranks = tuple(RankStep(r, str(r // 2), 0.0, STEP, (rows, gradients)) for r in group)
    return Step(1, ranks, {"layers.0": LOADS[0]})


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(config(), VOCABULARY, [recorded_step()], PROFILE)


def test_the_setting_itself_takes_what_was_recorded(predictor: Predictor) -> None:
    same = predictor.predict("same", [], config())
    assert same.step == pytest.approx(STEP)
    assert same.exposed == pytest.approx(EXPOSED)


def test_links_twice_as_fast_halve_what_they_limit(predictor: Predictor) -> None:
    """Half the time for all-to-all, and for gradients, which cross nodes."""
    fast = predictor.predict("fast", [], config(), faster=2)
    assert fast.exposed == pytest.approx(EXPOSED / 2)
    assert fast.step == pytest.approx(STEP - EXPOSED / 2 - DATA / 2)


def test_experts_inside_a_node_need_no_link_but_their_gradients_do(predictor: Predictor) -> None:
    narrow = predictor.predict("ep 2", [], config(parallel={"ep": 2}))
    assert narrow.exposed < 0.01 * EXPOSED
    # Each rank's four experts are summed over two nodes: 2 · 8 · 8 + 8 · 8 numbers of 4 bytes each.
    base = predictor.base["data"]
    experts = 4 * 4 * (2 * 8 * 8 + 8 * 8) / 1e6
    assert narrow.step == pytest.approx(STEP - EXPOSED + narrow.exposed + DATA * experts / base)


def test_hierarchical_dispatch_saves_rows_between_nodes(predictor: Predictor) -> None:
    """Flat: rows to the other node are 4 · 128 / 256 of loads to node 1's experts from node 0, and more to node 0's.

    A token reaches the other node's four of eight experts at all with chance 1 − C(4, 4) / C(8, 4).
    """
    flat = max(4 * 16 * share for share in (160 / 256, 96 / 256))
    level = config(parallel={"ep": 4, "dispatch": {"kind": "hierarchical"}})
    found = predictor.predict("hierarchical", [], level)
    assert found.exposed == pytest.approx(EXPOSED * 16 * (1 - 1 / 70) / flat, rel=1e-3)


def test_a_capacity_drops_what_was_above_it(predictor: Predictor) -> None:
    """The mean load is 32: four experts lose 8 of 40 tokens."""
    moe = {"experts": 8, "top_k": 4, "ffn_hidden": 8, "capacity_factor": 1.0}
    found = predictor.predict("capacity", [], config(model={"moe": moe}))
    assert found.exposed == pytest.approx(EXPOSED * (256 - 32) / 256)


def test_without_expert_parallelism_no_all_to_all_is_left(predictor: Predictor) -> None:
    """The exchange of counts goes too. Its time does not depend on the number of rows."""
    counts = CollectiveSpan(
        "all_to_all_counts", "expert", (0, 1, 2, 3), 1, 0.7, 0.7, 0.75, 80, (20,) * 4, "layers.0", "dispatch"
    )
    ranks = tuple(RankStep(r.rank, r.host, r.begin, r.end, (*r.collectives, counts)) for r in recorded_step().ranks)
    with_counts = Predictor(config(), VOCABULARY, [Step(1, ranks, {"layers.0": LOADS[0]})], PROFILE)
    assert with_counts.recorded.total.exposed == pytest.approx(EXPOSED + 0.05)
    assert with_counts.predict("ep 1", [], config(parallel={"ep": 1})).exposed == 0


def test_without_a_pipeline_its_bubble_goes() -> None:
    """0.2 s of waiting for a neighbour, and 0.1 s for its message."""
    piped = {"layers": 2}
    sent = CollectiveSpan("send", "pipeline", (0, 2), 0, 0.3, 0.3, 0.3, 8)
    received = CollectiveSpan("recv", "pipeline", (0, 2), 0, 0.1, 0.1, 0.4, 8)
    ranks = tuple(RankStep(r, "0", 0.0, 1.0, ((received,) if r == 2 else (sent,) if r == 0 else ())) for r in range(4))
    base = config(model=piped, parallel={"ep": 1, "pp": 2})
    links = Profile({**PROFILE.lines, "all_reduce intra": line(1e9)}, {})
    step = Predictor(base, VOCABULARY, [Step(1, ranks)], links)
    total = step.recorded.total
    assert total.bubble + total.others["pipeline"] == pytest.approx(0.3 / 4)
    same = step.predict("same", [], base).step
    flat = config(model=piped, parallel={"ep": 1, "pp": 1})
    change = step.factor["data"] * (step.seconds(flat, links)["data"] - step.base["data"])
    assert step.predict("pp 1", [], flat).step == pytest.approx(same - 0.3 / 4 + change)
    with pytest.raises(WhatIfError, match=r"parallel.pp \(2 → 4\) cannot be predicted.*only the end of pipelining"):
        step.predict("pp 4", [], config(model=piped, parallel={"ep": 1, "pp": 4}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"micro_batch": 2}}, r"train.micro_batch \(1 → 2\)"),
        ({"model": {"hidden": 16}}, r"model.hidden \(8 → 16\)"),
        ({"cluster": {"nodes": 4}}, r"cluster.nodes \(2 → 4\)"),
        ({"parallel": {"tp": 2}}, r"parallel.tp \(1 → 2\)"),
        ({"launch": {"link_gbit": None}}, r"launch.link_gbit \(1.0 → None\).*unknown"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(predictor: Predictor, changes: dict, said: str) -> None:
    with pytest.raises(WhatIfError, match=rf"(?s){said}.*remedy: change only parallel.ep, .*and parallel.pp to 1"):
        predictor.predict("other", [], config(**changes))


def test_the_rate_of_links_is_a_setting_as_any(predictor: Predictor) -> None:
    fast = predictor.predict("fast", [], config(launch={"link_gbit": 2.0}))
    assert fast.exposed == pytest.approx(EXPOSED / 2)


def test_links_without_a_bandwidth_predict_nothing() -> None:
    flat = Profile({**PROFILE.lines, "all_to_all inter": LinkModel(1e-3, 0.0, 0.0, 0.0, 1024, 4096)}, {})
    with pytest.raises(ProfileError, match=r"(?s)no bandwidth of 'all_to_all inter' \(β = ∞\).*4,096.*remedy: measure"):
        Predictor(config(), VOCABULARY, [recorded_step()], flat)


def test_loads_that_are_damaged_are_left_out(predictor: Predictor) -> None:
    """One layer has no tokens, one has fewer experts than the last."""
    odd = [Step(n, recorded_step().ranks, {"layers.0": load}) for n, load in enumerate(([0.0] * 8, [3.0, 1.0]))]
    found = Predictor(config(), VOCABULARY, [*odd, recorded_step()], PROFILE)
    assert found.loads == predictor.loads
    assert found.predict("same", [], config()).step == pytest.approx(STEP)
    nothing = Predictor(config(), VOCABULARY, [odd[0]], PROFILE)
    limited = config(model={"moe": {**BASE["model"]["moe"], "capacity_factor": 1.0}})
    assert nothing.predict("same", [], limited).step == pytest.approx(STEP)


def test_settings_worth_a_prediction() -> None:
    assert variants(config()) == {
        "experts over 2 ranks": ["parallel.ep=2"],
        "hierarchical dispatch": ["parallel.dispatch.kind=hierarchical"],
        "four chunks that overlap": ["parallel.dispatch.chunks=4"],
        "capacity factor 1": ["model.moe.capacity_factor=1.0"],
        "links twice as fast": ["launch.link_gbit=2"],
    }
    assert variants(config(parallel={"ep": 1})) == {}
