"""Patterns of layers: which block is what, and what a mistake in one is answered with."""

from __future__ import annotations

import pytest
import torch

from moesys.config import Config
from moesys.errors import Problem
from moesys.models.attention import GroupedQueryAttention
from moesys.models.decoder import Decoder
from moesys.models.layers import FeedForward
from moesys.models.parts.mixer import seen
from moesys.models.size import flops_per_token, weights
from moesys.moe import MoELayer
from moesys.parallel.dimension import check

LOCAL = {"heads": 4, "head_dim": 8, "window": 3}
PATTERN = {"count": 6, "first": ["attention dense"], "repeat": ["local moe", "attention moe", "local dense"]}
MODEL = {
    "hidden": 32, "ffn_hidden": 48, "layers": PATTERN, "attention": {"heads": 4}, "mixers": {"local": LOCAL},
    "moe": {"experts": 4, "ffn_hidden": 16},
}  # fmt: skip


def config(**change) -> Config:
    return Config.model_validate({"model": {**MODEL, **change}})


def test_each_block_has_the_mixer_and_the_feed_forward_of_its_word():
    model = Decoder(config().model, 64)
    windows, kinds = [], []
    for block in model.blocks():
        assert isinstance(block.attention, GroupedQueryAttention)
        windows.append(block.attention.core.window)
        kinds.append(type(block.ffn))
    assert windows == [None, 3, None, 3, 3, None]
    assert kinds == [FeedForward, MoELayer, MoELayer, FeedForward, MoELayer, MoELayer]
    assert config().model.moe_blocks == [1, 2, 4, 5]
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert built == {w.name: w.shape for w in weights(config().model, 64)}
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 64)


def test_a_pattern_of_one_word_is_the_model_of_as_many_layers():
    plain = {"attention": {"heads": 4}, "mixers": {}}
    one = config(**plain, layers=3)
    same = config(**plain, layers={"count": 3, "repeat": ["attention moe"]})
    assert list(weights(one.model, 64)) == list(weights(same.model, 64))
    assert flops_per_token(one.model, 64, 16) == flops_per_token(same.model, 64, 16)


def test_keys_that_a_query_sees():
    for tokens, window in ((8, None), (8, 3), (8, 8), (8, 20), (1, 1)):
        exact = sum(min(i + 1, window or tokens) for i in range(tokens)) / tokens
        # The convention leaves out half a key: a token's own pair counts half.
        assert seen(tokens, window) == pytest.approx(exact - min(window or tokens, tokens) / tokens / 2)


MISTAKES = {
    "an unknown mixer": (
        {"layers": {"count": 2, "repeat": ["locl moe"]}}, "model.layers.repeat", "there is no mixer locl", "local?",
    ),
    "a mixer that no block uses": (
        {"layers": {"count": 2, "repeat": ["attention moe"]}}, "model.mixers.local", "no block of the pattern uses it",
        "remove it",
    ),
    "mixers without a pattern": ({"layers": 2}, "model.mixers", "model.layers is a number", "set model.layers"),
    "more first blocks than blocks": (
        {"layers": {"count": 1, "first": ["local moe"] * 2, "repeat": ["local moe"]}}, "model.layers.first",
        "holds 2 blocks, more than count(1)", "fewer",
    ),
    "MoE blocks without experts": ({"moe": None}, "model.layers", "model.moe is absent", "add model.moe"),
    "experts without MoE blocks": (
        {"layers": {"count": 2, "repeat": ["local dense"]}}, "model.layers", "has no MoE block", "use moe",
    ),
    "two ways to say which": (
        {"moe": {"experts": 4, "ffn_hidden": 16, "every": 2}}, "model.moe.every", "the pattern of model.layers says",
        "remove it",
    ),
    "an odd head in a mixer": (
        {"mixers": {"local": {"heads": 4, "head_dim": 7}}}, "model.mixers.local.head_dim", "must be even", "even",
    ),
    "a key of another kind": (
        {"attention": {"heads": 4, "kv_lora_rank": 16}}, "model.attention.kv_lora_rank", "gqa does not use it; mla",
        "remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_key(name):
    change, key, rule, remedy = MISTAKES[name]
    found = check(config(**change))
    assert len(found) == 1, found
    (problem,) = found
    assert isinstance(problem, Problem)
    assert problem.key == key and rule in problem.rule and remedy in problem.remedy, problem
