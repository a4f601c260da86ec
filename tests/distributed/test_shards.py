"""What a training step gathers and sums over data ranks: how often, how many bytes, and in what order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from sabotage import BUCKET_BYTES
from shards import BACK, RUNS, observed
from support import changed

from moesys.config import Config
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import check, step_shape, traffic

LAYERS, N = 4, 2
"""Blocks, and micro-batches of a step, unless a case says otherwise."""

FULL: dict[str, Any] = {"dp_shard": "full"}
ALONE: dict[str, dict[str, Any]] = {
    "shards": {"parallel": {**FULL, "ep": 2}},
    "recomputed": {"parallel": {**FULL, "ep": 2}, "train": {"recompute": "full", "dtype": "bfloat16"}},
    "tied": {"parallel": FULL, "train": {"recompute": "selective"}, "model": {"tie_embeddings": True}},
    "counting": {"parallel": FULL, "model": {"moe": {"global_balance_loss": 0.02}}},
    "each": {"parallel": {**FULL, "ep": 2, "sync_gradients": "each"}},
    "hybrid": {"parallel": {"dp_shard": 2}},
    "hybrid each": {"parallel": {"dp_shard": 2, "sync_gradients": "each"}},
}
PIPELINES: dict[str, dict[str, Any]] = {
    "1f1b": {"parallel": {**FULL, "pp": 2}},
    "gpipe each": {"parallel": {**FULL, "pp": 2, "pp_schedule": "gpipe", "sync_gradients": "each"}},
    "interleaved": {
        "parallel": {**FULL, "pp": 2, "pp_virtual": 4, "pp_schedule": "interleaved-1f1b"},
        "train": {"dtype": "bfloat16"},
        "model": {"layers": 8},
    },
    "interleaved each": {
        "parallel": {**FULL, "pp": 2, "pp_virtual": 2, "pp_schedule": "interleaved-1f1b", "sync_gradients": "each"}
    },
}
REPLICAS: dict[str, dict[str, Any]] = {
    "replicas": {"parallel": {"ep": 2}},
    "replicas, tp": {"parallel": {"tp": 2}},
    "replicas, 1f1b": {"parallel": {"pp": 2}, "model": {"tie_embeddings": True}},
    "replicas, zero-bubble": {"parallel": {"pp": 2, "pp_virtual": 2, "pp_schedule": "zero-bubble"}},
}
SABOTAGED = {
    "freed after forward": PIPELINES["1f1b"],
    "asked for late": ALONE["shards"],
    "summed at the end": REPLICAS["replicas"],
}
"""What `shards.SABOTAGE` spoils."""
CASES = ALONE | PIPELINES | REPLICAS | SABOTAGED


def configuration(small: dict, case: dict[str, Any]) -> Config:
    model = {"hidden": 32, "moe": {"ffn_hidden": 16, "experts": 4}}
    degree = case["parallel"].get("pp", 1) * case["parallel"].get("tp", 1)
    train = {"seq_len": 8, "global_batch": 4 // degree * N, "eval_sequences": 4}
    config = Config.model_validate(
        changed(small, {"model": model, "train": train, "cluster": {"ranks_per_node": 4}}, case)
    )
    assert check(config) == []
    return config


@pytest.fixture(scope="module")
def configs(small: dict) -> dict[str, Config]:
    return {name: configuration(small, case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(configs: dict[str, Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return observed(configs, 4, tmp_path_factory.mktemp("shards"))


def sizes(rank: dict[str, Any], kind: str) -> Counter[int]:
    """How many collectives of this kind there were over data ranks, by their bytes."""
    return Counter(size for what, size, _, _ in rank["events"] if what == kind)


def gathers(name: str, unit: str) -> int:
    """How often a unit is to be gathered in a step."""
    counting = int(name == "counting")
    if name in PIPELINES:
        return 1
    if unit.startswith("layers."):
        return N * (2 + counting)
    return N * (1 + counting) if unit == "embed" else N + counting


@pytest.mark.parametrize("name", [*ALONE, *PIPELINES])
def test_weights_are_gathered_as_often_as_they_must_be(name, found, configs):
    """Each unit alone; routers in no unit at all; and with a pipeline once, whatever the micro-batches."""
    width = 2 if configs[name].train.dtype == "bfloat16" else 4
    for rank in found[name]:
        expected: Counter[int] = Counter()
        for unit, elements in rank["units"].items():
            expected[elements * width] += gathers(name, unit)
        assert sizes(rank, "all_gather") == expected
        assert rank["sharded"] == (True, True, True)


@pytest.mark.parametrize("name", [*ALONE, *PIPELINES])
def test_gradients_are_summed_over_shards_once_or_for_each_micro_batch(name, found):
    times = N if name.endswith("each") else 1
    for rank in found[name]:
        scattered = Counter(4 * elements for elements in rank["units"].values())
        assert sizes(rank, "reduce_scatter") == Counter({size: count * times for size, count in scattered.items()})
        if "hybrid" in name:  # over the replicas of shards once, however often over shards
            shards = [4 * elements // 2 for elements in rank["units"].values()]
            over_replicas = sizes(rank, "all_reduce")
            assert {size: over_replicas[size] for size in shards} == dict(Counter(shards))


@pytest.mark.parametrize("name", [*ALONE, *PIPELINES])
def test_the_plan_says_what_is_gathered_and_summed(name, found, configs):
    config = configs[name]
    degrees, _ = resolve(config)
    assert degrees is not None
    for number, rank in enumerate(found[name]):
        told: Counter[str] = Counter()
        for shape in step_shape(config, degrees, 320, number // degrees.stage):
            for move in traffic(shape):
                if any("shard" in axis for axis in move.axes) and move.kind != "all_reduce":
                    told[move.kind] += round(move.bytes * move.calls)
        for kind in ("all_gather", "reduce_scatter"):
            assert sum(size * count for size, count in sizes(rank, kind).items()) == told[kind], kind


@pytest.mark.parametrize("name", ["shards", "recomputed", "hybrid each"])
def test_weights_of_the_next_block_are_asked_for_before_a_block_computes(name, found, configs):
    """The experts' too, forward and backward; and not those of the block after the next."""
    width = 2 if configs[name].train.dtype == "bfloat16" else 4
    for rank in found[name]:
        block, experts = (width * rank["units"][unit] for unit in ("layers.0", "layers.0.ffn.experts"))
        seen: list[tuple[str, int, int]] = []
        asked: Counter[int] = Counter()
        last = ""
        for what, size, _, _ in rank["events"]:
            if what == "all_gather":
                asked[size] += 1
            elif what in (RUNS, BACK):
                if (name, last, what) != ("recomputed", BACK, RUNS):  # backward begins with forward once more
                    seen.append((what, asked[block], asked[experts]))
                last = what
        one = [min(n + 2, LAYERS) for n in range(LAYERS)]
        both = [*zip([RUNS] * LAYERS, one, one, strict=True), *((BACK, LAYERS + n, LAYERS + n) for n in one)]
        later = [(what, b + 2 * LAYERS, e + 2 * LAYERS) for what, b, e in both]
        assert seen == both + later


@pytest.mark.parametrize("name", REPLICAS)
def test_replicated_gradients_are_summed_while_backward_runs(name, found):
    """In buckets, in the same order on all ranks, from the last micro-batch's backward on."""
    for rank in found[name]:
        kinds = [(what, purpose) for what, _, _, purpose in rank["events"]]
        sums = [n for n, event in enumerate(kinds) if event == ("all_reduce", "data")]
        back = [n for n, (what, _) in enumerate(kinds) if what == BACK]
        assert len(sums) >= 4
        assert back[len(back) // 2 - 1] < sums[0] < back[-1], "in the last backward pass, and before it has ended"


@pytest.mark.parametrize("name", REPLICAS)
def test_all_ranks_sum_the_same_buckets_in_the_same_order(name, found, configs):
    by_stage: dict[int, list[list[tuple[Any, ...]]]] = {}
    for number, rank in enumerate(found[name]):
        sums = [event for event in rank["events"] if (event[0], event[3]) == ("all_reduce", "data")]
        by_stage.setdefault(number * configs[name].parallel.pp // 4, []).append(sums)
    for first, *others in by_stage.values():
        assert others == [first] * len(others)


@pytest.mark.parametrize("name", REPLICAS)
def test_sums_of_gradients_need_no_copy_of_them_all(name, found):
    for rank in found[name]:
        total, peak = rank["sums"]
        assert total > 4 * BUCKET_BYTES, "else this shows nothing"
        assert peak < total + 1.25 * BUCKET_BYTES


def test_what_is_spoiled_is_found(found, configs):
    spoiled = found["freed after forward"]
    with pytest.raises(AssertionError):
        test_weights_are_gathered_as_often_as_they_must_be("1f1b", {"1f1b": spoiled}, configs)
    with pytest.raises(AssertionError):
        test_the_plan_says_what_is_gathered_and_summed("1f1b", {"1f1b": spoiled}, configs)
    spoiled = found["asked for late"]
    with pytest.raises(AssertionError):
        test_weights_of_the_next_block_are_asked_for_before_a_block_computes("shards", {"shards": spoiled}, configs)
    spoiled = found["summed at the end"]
    with pytest.raises(AssertionError):
        test_replicated_gradients_are_summed_while_backward_runs("replicas", {"replicas": spoiled})
    with pytest.raises(AssertionError):
        test_sums_of_gradients_need_no_copy_of_them_all("replicas", {"replicas": spoiled})
