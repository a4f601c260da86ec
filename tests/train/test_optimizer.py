"""The learning rate of every step, and what decays."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch

from moesys.config import Config
from moesys.config.schema import OptimizerConfig, TrainConfig
from moesys.models.decoder import Decoder
from moesys.models.size import weights
from moesys.train.optimizer import build, learning_rate


def rates(**schedule) -> list[float]:
    raw = {"steps": 20, "optimizer": {"lr": 1.0}, "schedule": schedule}
    config = TrainConfig.model_validate(raw)
    return [learning_rate(config, step) for step in range(1, 21)]


def test_cosine_with_warmup():
    found = rates(kind="cosine", warmup=4, min_ratio=0.2)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    expected = [0.2 + 0.8 * (1 + cos(pi * n / 16)) / 2 for n in range(1, 17)]
    assert found[4:] == pytest.approx(expected)
    assert found[-1] == pytest.approx(0.2)


def test_wsd_is_flat_then_linear():
    found = rates(kind="wsd", warmup=2, decay=5, min_ratio=0.0)
    assert found[2:15] == [1.0] * 13
    assert found[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_constant_stays():
    assert set(rates(kind="constant")) == {1.0}


def test_matrices_decay_and_biases_norms_and_temperatures_do_not():
    moe = {"experts": 4, "ffn_hidden": 8, "bias": True, "gate": {"kind": "cosine"}}
    moe |= {"shared_experts": 1, "shared_mix": "residual", "constant_experts": 2}
    raw = {"hidden": 16, "layers": 1, "moe": moe, "attention": {"heads": 2, "bias": True, "qk_norm": "head"}}
    config = Config.model_validate({"model": raw}).model
    model, kinds = Decoder(config, 32), {weight.name: weight.kind for weight in weights(config, 32)}
    for p in model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    build(
        OptimizerConfig(lr=0.5, weight_decay=0.1), dict(model.named_parameters()), lambda name: kinds[name] == "matrix"
    ).step()
    stay = {name for name, p in model.named_parameters() if torch.equal(p, torch.ones_like(p))}
    assert stay == {
        *(f"layers.0.attention.{name}_proj.bias" for name in "qkvo"),
        *(f"layers.0.{name}.weight" for name in ("attention_norm", "ffn_norm", "attention.q_norm", "attention.k_norm")),
        *(f"layers.0.ffn.{name}" for name in ("experts.fc1_bias", "experts.fc2_bias", "mix.projection.bias")),
        "layers.0.ffn.gate.projection.log_temperature",
        "norm.weight",
    }
    for name in set(dict(model.named_parameters())) - stay:
        torch.testing.assert_close(
            model.get_parameter(name).detach(), torch.full_like(model.get_parameter(name), 1 - 0.5 * 0.1)
        )
