"""The value that `parallel.sync_gradients: auto` chooses, what the dry run says of it, and where `each` is refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from support import changed

from moesys.config import Config
from moesys.launchers.dry_run import plan, show, verdict
from moesys.parallel.degrees import Degrees, resolve
from moesys.parallel.dimension import check, step_shape
from moesys.parallel.gradient_sync import settle, settled, with_sync
from moesys.parallel.memory import estimate

VOCABULARY = 32000
LARGE = {
    "model": {
        "vocab_size": VOCABULARY, "hidden": 1024, "layers": 8, "attention": {"heads": 16, "kv_heads": 4},
        "moe": {"experts": 8, "ffn_hidden": 2048},
    },
    "train": {"seq_len": 256, "global_batch": 32},
    "parallel": {"dp_shard": "full"},
    "cluster": {"ranks_per_node": 8, "device": "cuda"},
}  # fmt: skip
GIB = 2**30


def large(small: dict, *changes: dict) -> tuple[Config, Degrees]:
    config = Config.model_validate(changed(small, LARGE, *changes))
    degrees, problems = resolve(config)
    assert degrees is not None and problems == [] == check(config)
    return config, degrees


def needed(config: Config, degrees: Degrees, sync: Any) -> float:
    return estimate(step_shape(with_sync(config, sync), degrees, VOCABULARY, 0)).total


def test_auto_is_once_unless_that_does_not_fit(small):
    config, degrees = large(small)
    once, each = (needed(config, degrees, sync) for sync in ("once", "each"))
    # Whole gradients of four micro-batches in float32, against an eighth of them.
    whole = sum(s.held(unsharded=True) for s in step_shape(config, degrees, VOCABULARY, 0))
    sharded = sum(s.held() for s in step_shape(config, degrees, VOCABULARY, 0))
    assert once - each == pytest.approx(4 * (whole - sharded)) and whole > 7 * sharded
    for limit, sync, why in (
        (None, "once", "cluster.memory_gib is not given"),
        (once / GIB * 1.01, "once", "it fits with"),
        (once / GIB * 0.99, "each", "once does not fit with"),
        (each / GIB * 0.99, "each", "once does not fit with"),
    ):
        given, _ = large(small, {"cluster": {"memory_gib": limit}})
        found = settle(given, degrees, VOCABULARY)
        assert found is not None and (found.sync, found.needs) == (sync, {"once": once, "each": each})
        assert why in found.why
        assert settled(given, degrees, VOCABULARY).parallel.sync_gradients == sync


def test_what_is_asked_for_is_done(small):
    for sync in ("once", "each"):
        config, degrees = large(small, {"parallel": {"sync_gradients": sync}, "cluster": {"memory_gib": 0.01}})
        found = settle(config, degrees, VOCABULARY)
        assert found is not None and (found.sync, found.why) == (sync, "parallel.sync_gradients says so")


@pytest.mark.parametrize(
    "change",
    [{"train": {"global_batch": 8}}, {"parallel": {"dp_shard": 1}}, {"engine": "megatron"}],
    ids=["one micro-batch", "no shards", "Megatron"],
)
def test_nothing_is_told_where_both_are_the_same(small, change):
    config, degrees = large(small, change)
    assert settle(config, degrees, VOCABULARY) is None
    assert plan(config)["sync_gradients"] is None


def test_on_cpu_a_node_must_hold_its_ranks(small):
    cpu = {"cluster": {"device": "cpu"}}
    config, degrees = large(small, cpu)
    once = 8 * needed(config, degrees, "once")
    for factor, sync in ((1.01, "once"), (0.99, "each")):
        given, _ = large(small, cpu, {"cluster": {"memory_gib": once / GIB * factor}})
        found = settle(given, degrees, VOCABULARY)
        assert found is not None and found.sync == sync and found.needs["once"] == pytest.approx(once)


def test_the_dry_run_shows_both_and_why(small):
    config, degrees = large(small)
    limit = needed(config, degrees, "once") / GIB * 0.99
    config, _ = large(small, {"cluster": {"memory_gib": limit}})
    facts = plan(config)
    told = facts["sync_gradients"]
    assert told["chosen"] == "each" and "once does not fit" in told["why"]
    assert told["each"]["moved_bytes"] == 4 * told["once"]["moved_bytes"]
    assert told["each"]["gradient_bytes"] < told["once"]["gradient_bytes"]
    (rank,) = facts["pipeline_ranks"]
    assert rank["memory_bytes"]["total"] == told["each"]["memory_bytes"], "the plan is of what is chosen"
    assert facts["fits"] and "DOES NOT FIT" not in verdict(config, facts)
    console = Console(width=80, file=io.StringIO())
    show(config, console, facts)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "parallel.sync_gradients" in shown and "each is chosen: once does not fit with" in shown
    assert "│ once │" in shown and "│ each │" in shown


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"parallel": {"dp_shard": 1}},
            "each sums the gradients of each micro-batch over the shards of dp_shard, which is 1",
        ),
        ({"engine": "megatron"}, "Megatron keeps whole gradients between micro-batches"),
    ],
)
def test_each_is_refused_where_it_means_nothing(small, change, rule):
    config = Config.model_validate(changed(small, LARGE, {"parallel": {"sync_gradients": "each"}}, change))
    (problem,) = check(config)
    assert problem.key == "parallel.sync_gradients" and problem.rule == rule and problem.remedy
