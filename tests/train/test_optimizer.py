"""The learning rate of every step, and what decays."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch

from moesys.config.schema import OptimizerConfig, TrainConfig
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


def test_matrices_decay_and_vectors_do_not():
    matrix, vector = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((2, 2), (2,)))
    optimizer = build(OptimizerConfig(lr=0.5, weight_decay=0.1), {"m": matrix, "v": vector})
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 1 - 0.5 * 0.1))
    torch.testing.assert_close(vector.detach(), torch.ones(2))
