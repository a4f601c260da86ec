"""Rules between keys that can be read are told beside keys in error, and no rule that one of those decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import changed

from moesys.config.placeholders import ROUNDS, with_placeholders
from moesys.config.schema import Config
from moesys.config.tree import Entry
from moesys.errors import ConfigError
from moesys.train.validate import load_checked

MOE = {"experts": 8, "top_k": 2, "ffn_hidden": 32}
BASE = {
    "model": {"hidden": 64, "layers": 4, "attention": {"heads": 4, "kv_heads": 2}, "moe": MOE},
    "train": {"seq_len": 64, "global_batch": 16, "micro_batch": 1},
    "cluster": {"ranks_per_node": 4, "device": "cpu"},
}


def told(folder: Path, change: dict, *overrides: str) -> dict[str, str]:
    """The keys that a wrong configuration is told of, each with its whole message."""
    path = folder / "wrong.yaml"
    path.write_text(yaml.safe_dump(changed(BASE, change)))
    with pytest.raises(ConfigError) as caught:
        load_checked(path, overrides)
    assert len({str(problem) for problem in caught.value.problems}) == len(caught.value.problems)
    return {problem.key: str(problem) for problem in caught.value.problems}


WSD = {"schedule": {"kind": "wsd", "warmup": 10**6}}
CASES = {
    "a wrong type beside rules": (
        {"seed": "x", "model": {"attention": {"kv_heads": 3}}, "output": {"wandb": True}, "train": WSD},
        {"seed", "model.attention.kv_heads", "output.wandb", "train.schedule.decay"},
    ),
    "a rule that needs the key": ({"parallel": {"tp": "two", "dp": 3}}, {"parallel.tp"}),
    "a bound beside its own rule": ({"model": {"moe": {"top_k": 0, "experts": 6}}}, {"model.moe.top_k"}),
    "the key that was meant": (
        {"parallel": {"tpp": 2, "dp": 2}, "train": {"seq_len": 63}, "data": {"kind": "text"}},
        {"parallel.tpp", "data.path"},
    ),
    "a key that nobody meant": ({"qqq": 1, "parallel": {"dp": 3}}, {"qqq", "parallel.dp"}),
    "a missing key": (
        {"model": {"moe": {"experts": None, "gate": {"groups_kept": 2}}}},
        {"model.moe.experts", "model.moe.gate.groups_kept"},
    ),
    "a section that is none": ({"model": 3, "output": {"wandb": True}}, {"model", "output.wandb"}),
    "rules of the gate where ranks do not fit": (
        {"parallel": {"dp": 3}, "model": {"moe": {"gate": {"groups": 3}}}},
        {"parallel.dp", "model.moe.gate.groups"},
    ),
    "data beside a wrong type": ({"train": {"steps": "x"}, "data": {"kind": "text"}}, {"train.steps", "data.path"}),
}


@pytest.mark.parametrize(("change", "keys"), CASES.values(), ids=CASES)
def test_exactly_the_rules_of_readable_keys_are_told(tmp_path, change, keys):
    assert set(told(tmp_path, change)) == keys


def test_a_rule_beside_an_error_has_its_place_and_value(tmp_path):
    messages = told(tmp_path, {"seed": "x", "model": {"attention": {"kv_heads": 3}}})
    assert "wrong.yaml:" in messages["model.attention.kv_heads"]
    assert "model.attention.kv_heads is 3: must divide model.attention.heads(4)" in messages["model.attention.kv_heads"]


def test_overrides_that_cannot_be_read_leave_their_key_open(tmp_path):
    assert set(told(tmp_path, {"output": {"wandb": True}}, "parallel.tp 2", "parallel.dp=2")) == {"", "output.wandb"}


def test_nothing_is_asked_where_a_file_cannot_be_read(tmp_path):
    assert set(told(tmp_path, {"include": "nowhere.yaml", "parallel": {"dp": 3}})) == {"include"}


def test_every_section_has_placeholders():
    tree = Entry({}, "file.yaml")
    keys = list(Config.model_fields)
    for number in range(ROUNDS):
        config = with_placeholders(tree, keys, number)
        assert isinstance(config, Config), f"round {number}"
