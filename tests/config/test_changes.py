"""What a change of a key means to a run that goes on: decided for every key, told by name."""

from __future__ import annotations

import pytest
from support import changed

from moesys.config import Config, legal
from moesys.config.changes import KINDS, Kind
from moesys.config.differences import SECRET, differences, known, saved_form

RAW: dict = {"model": {"hidden": 64, "layers": 2, "moe": {"experts": 4, "ffn_hidden": 32}}}


def saved(*changes: dict) -> dict:
    return saved_form(Config.model_validate(changed(RAW, *changes)))


def test_every_key_of_the_schema_is_decided_about() -> None:
    """A new key must be put into `changes.KINDS`: what follows when it changes between two launches of a run?"""
    keys = list(legal.keys())
    single = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert single - KINDS.keys() == set(), "without a kind"
    assert KINDS.keys() - single == {"model.layers"}, "all in the schema; this one is a number or a section"
    assert set(SECRET) <= single


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"hidden": 32}}, ["model.hidden: saved 64, now 32"]),
        ({"model": {"moe": {"balance_loss": 0.5}}}, ["model.moe.balance_loss: saved 0.01, now 0.5"]),
        ({"model": {"moe": None}}, ["model.moe: saved given, now null"]),
        ({"train": {"optimizer": {"betas": [0, 0.9]}}}, ["train.optimizer.betas: saved [0.9, 0.95], now [0.0, 0.9]"]),
        ({"output": {"keep": 5}, "name": "other", "launch": {"env": {"A": "b"}}}, []),
        ({"model": {"attention": {"kv_heads": 4, "head_dim": 16}, "moe": {"shared_ffn_hidden": 32}}}, []),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_differences_are_told_by_key(change: dict, told: list[str]) -> None:
    assert [str(c) for c in differences(saved(), saved(change))] == told


def test_a_key_that_an_older_version_lacks_has_its_default() -> None:
    old = saved()
    del old["model"]["moe"]["zero_tau"], old["train"]["schedule"], old["measure"]
    assert differences(old, saved()) == []
    assert [c.key for c in differences(old, saved({"model": {"moe": {"zero_tau": 0.5}}}))] == ["model.moe.zero_tau"]


def test_an_optional_section_that_an_older_version_lacks_is_null() -> None:
    old = saved({"model": {"moe": None}})
    now = {**old, "model": dict(old["model"])}
    del old["model"]["moe"]
    assert differences(old, now) == []


def test_a_key_that_only_another_version_knows_is_told_unless_it_is_harmless() -> None:
    newer = saved()
    newer["model"]["moe"] |= {"novelty": 2, "window": None, "sinks": False, "router": "none"}
    newer["measure"]["colour"] = "red"
    (change,) = differences(newer, saved())
    assert change.row() == "model.moe.novelty: saved 2, now absent (unknown to this version)"
    assert change.kind is Kind.UNKNOWN


PATTERN = {"model": {"layers": {"count": 2, "repeat": ["local moe", "attention moe"]}, "mixers": {"local": {}}}}


def test_the_keys_of_a_named_mixer_are_those_of_attention() -> None:
    old = saved(PATTERN)
    local = old["model"]["mixers"]["local"]
    del local["window"], local["qk_norm"]  # keys that an older version does not know
    assert differences(old, saved(PATTERN)) == []
    (change,) = differences(old, saved(PATTERN, {"model": {"mixers": {"local": {"qk_norm": "head"}}}}))
    assert change.row() == "model.mixers.local.qk_norm: saved none, now head (cannot fit)"
    assert differences(saved(PATTERN), saved(PATTERN, {"model": {"mixers": {"local": {"kv_heads": 4}}}})) == []


def test_unknown_keys_are_left_out_and_named_unless_they_are_harmless() -> None:
    tree = saved(PATTERN)
    tree["model"]["mixers"]["local"] |= {"sinks": False, "novelty": 3}
    tree["model"]["attention"] |= {"novelty": None}
    found, unknown = known(tree, Config)
    assert unknown == ["model.mixers.local.novelty"]
    assert Config.model_validate(found) == Config.model_validate(saved(PATTERN))


def test_mixers_and_patterns_that_one_side_lacks_are_told_as_a_whole() -> None:
    assert [str(c) for c in differences(saved(), saved(PATTERN))] == [
        "model.layers: saved 2, now given",
        "model.mixers: saved {}, now given",
    ]
    more = {"model": {"mixers": {"far": {"window": 8}}}}
    found = differences(saved(PATTERN), saved(PATTERN, more))
    assert [str(c) for c in found] == ["model.mixers.far: saved absent, now given"]


def test_a_key_that_the_kind_of_attention_does_not_use_has_no_effect() -> None:
    assert differences(saved(), saved({"model": {"attention": {"kv_lora_rank": 64}}})) == []
    latent = {"model": {"attention": {"kind": "mla"}}}
    (change,) = differences(saved(latent), saved(latent, {"model": {"attention": {"kv_lora_rank": 64}}}))
    assert change.key == "model.attention.kv_lora_rank"


def test_what_may_be_a_secret_is_not_saved() -> None:
    assert "env" not in saved({"launch": {"env": {"WANDB_API_KEY": "x"}}})["launch"]
