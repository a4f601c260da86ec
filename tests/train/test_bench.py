"""The benchmark of training runs both sides; its figures are for docs, not for tests."""

from __future__ import annotations

from support import changed

from moesys.config import Config
from moesys.train import bench, verify


def test_both_sides_train(small):
    config = verify.reference(Config.model_validate(changed(small, {"model": {"layers": 1}})))
    speeds = bench.compare(config, rounds=2, steps=1)
    assert set(speeds) == {"moesys", "transformers"}
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in speeds.values())
