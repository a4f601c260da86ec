"""Checkpoints written before routers were replicated: FSDP sharded them then, beside the weights of their block."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_routers
import torch
from standing import Standing
from support import changed

from moesys.config import Config


def test_a_checkpoint_with_sharded_routers_is_loaded_into_replicated_ones(small: dict, tmp_path: Path) -> None:
    tiny = {"model": {"hidden": 16, "layers": 2, "attention": {"heads": 2}, "moe": {"ffn_hidden": 8}}}
    more = {"parallel": {"dp_shard": "full"}, "cluster": {"ranks_per_node": 2}, "train": {"steps": 2}}
    config = Config.model_validate(changed(small, tiny, more))
    standing = Standing(2)
    try:
        before = standing.ask(sharded_routers.written, config, tmp_path)
        after = standing.ask(sharded_routers.loaded, config, tmp_path)
    finally:
        standing.close()
    for old, new in zip(before, after, strict=True):
        assert old["sharded"] == [True, True] and new["sharded"] == [False, False]
        assert old["tensors"].keys() == new["tensors"].keys()
        assert any(".gate.projection.weight/exp_avg" in name for name in new["tensors"])
        for name, value in old["tensors"].items():
            assert torch.equal(value, new["tensors"][name]), name
        assert old["loss"] == pytest.approx(new["loss"], rel=1e-5)
