"""Stretched rotary positions against transformers' formulas, and what their keys must be."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import changed
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moesys.config import Config
from moesys.models.rotary import rotary_angles, stretched
from moesys.parallel import dimension

SIZE, THETA = 32, 1e4
ORIGINAL = {"original_max_position_embeddings": 64}
PAIRS = SIZE // 2
CASES: dict[str, dict] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "DeepSeek-V3": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, **ORIGINAL},
    "DeepSeek-V2": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.9, "mscale_all_dim": 0.707, **ORIGINAL},
    "GPT-OSS": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False, **ORIGINAL,
    },
    "a factor of its own": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25, **ORIGINAL},
    "longrope": {
        "rope_type": "longrope", "factor": 3.0, "short_factor": [1.0 + i / 8 for i in range(PAIRS)],
        "long_factor": [1.0 + i for i in range(PAIRS)], **ORIGINAL,
    },
}  # fmt: skip


def own(theirs: dict) -> dict:
    """The same as keys of `model.rope_scaling`."""
    names = {"rope_type": "kind", "original_max_position_embeddings": "original_seq_len"}
    return {names.get(key, key): value for key, value in theirs.items()}


def model(small: dict, scaling: dict | None, **more: object) -> Config:
    attention = {"heads": 2, "kv_heads": None, "head_dim": SIZE}
    change = {"hidden": 48, "rope_theta": THETA, "rope_scaling": scaling, "attention": attention, **more}
    return Config.model_validate(changed(small, {"model": change}))


@pytest.mark.parametrize("length", [48, 80])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(small, name, length):
    parameters = {"rope_theta": THETA, **CASES[name]}
    config = transformers.LlamaConfig(
        head_dim=SIZE, hidden_size=48, num_attention_heads=2, max_position_embeddings=256, rope_parameters=parameters
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    scaling = model(small, own(CASES[name])).model.rope_scaling
    plain = THETA ** -(torch.arange(0, SIZE, 2) / SIZE)
    found, own_factor = stretched(plain, THETA, scaling, length)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert own_factor == pytest.approx(factor, rel=1e-6)
    assert not torch.allclose(found, plain)
    cos, _ = rotary_angles(torch.zeros(1, dtype=torch.int64), SIZE, THETA, scaling, length)
    assert cos[0, 0].item() == pytest.approx(factor, rel=1e-6)


def test_phi_has_a_factor_for_short_and_for_long_sequences(small):
    given = own(CASES["longrope"]) | {"short_mscale": 1.5, "long_mscale": 2.5}
    del given["factor"]
    config = model(small, given)
    assert dimension.check(config) == []
    plain = torch.ones(PAIRS)
    assert [stretched(plain, THETA, config.model.rope_scaling, length)[1] for length in (64, 65)] == [1.5, 2.5]


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"kind": "linear"}, "model.rope_scaling.factor: is missing, and kind linear needs it"),
        ({"kind": "linear", "factor": 2.0, "truncate": False}, "linear does not use it; yarn does"),
        ({"kind": "yarn", "factor": 2.0}, "model.rope_scaling.original_seq_len: is missing"),
        (own(CASES["llama3"]) | {"low_freq_factor": 4.0}, "must be below high_freq_factor(4)"),
        (own(CASES["yarn"]) | {"beta_slow": 40.0}, "must be below beta_fast(32)"),
        (own(CASES["longrope"]) | {"short_factor": [1.0]}, "has 1 numbers, and 32 elements of a head are turned"),
    ],
)
def test_keys_that_do_not_fit_are_told(small, scaling, told):
    problems = dimension.check(model(small, scaling))
    assert len(problems) == 1 and told in str(problems[0]), problems


def test_a_part_of_a_head_has_pairs(small):
    problems = dimension.check(model(small, None, attention={"head_dim": 32, "rotary_fraction": 0.4}))
    assert "12 of 32" not in str(problems) and problems == []
    problems = dimension.check(model(small, None, attention={"head_dim": 32, "rotary_fraction": 0.42}))
    assert "13 of 32 elements must be even" in str(problems[0]) and "turns 12 or 14" in str(problems[0])
