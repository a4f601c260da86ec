"""Frozen parameters in the optimizer and in checkpoints, and what they cost."""

import json

import pytest
import torch
from torch import nn

from moesys.config import Config
from moesys.config.schema import OptimizerConfig
from moesys.errors import CheckpointError
from moesys.parallel import memory
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape, traffic
from moesys.train import manifest, optimizer, resume

MODEL = {"hidden": 64, "layers": 2, "moe": {"experts": 4, "ffn_hidden": 48, "lora_rank": 2}}


def config(*patterns: str, dp: int = 1) -> Config:
    raw = {"model": MODEL, "train": {"freeze": list(patterns)}, "cluster": {"ranks_per_node": dp}}
    return Config.model_validate(raw)


def test_the_optimizer_has_the_others_alone():
    trained, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2), requires_grad=False)
    groups = optimizer.build(
        OptimizerConfig(), {"a.weight": trained, "b.weight": frozen}, lambda name: True
    ).param_groups
    assert [p is trained for group in groups for p in group["params"]] == [True]


def test_a_stage_without_trained_parameters_steps():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer.build(OptimizerConfig(), {"b.bias": frozen}, lambda name: False).step()
    assert frozen.tolist() == [1, 1]


def test_a_checkpoint_cannot_thaw(tmp_path):
    written = config("embed.weight", "layers.*.attention.*")
    meta = {"step": 1, "samples": 8, "model": written.model.model_dump(), "freeze": written.train.freeze}
    (tmp_path / manifest.META).write_text(json.dumps(meta))
    found = manifest.read(tmp_path)
    assert resume.require_compatible(found, written) == []
    # More may be frozen than before.
    told = resume.require_compatible(found, config("embed.weight", "layers.*.attention.*", "head.weight"))
    assert [change.key for change in told] == ["train.freeze"]
    with pytest.raises(
        CheckpointError, match=r"no optimizer state of layers.0.attention.k_proj.weight, which was frozen"
    ):
        resume.require_compatible(found, config("embed.weight"))


def test_costs_leave_out_their_gradients_and_state():
    everything, part = config(dp=2), config("embed.weight", "head.weight", dp=2)
    rows = 2 * 320 * 64  # embedding and head
    found = []
    for c in (everything, part):
        degrees, _ = resolve(c)
        shapes = step_shape(c, degrees, 320, 0)
        reduced = sum(move.bytes for move in traffic(shapes[0]) if move.kind == "all_reduce")
        found.append((memory.estimate(shapes), reduced))
    (whole, all_bytes), (less, fewer_bytes) = found
    assert whole.weights == less.weights
    assert whole.gradients - less.gradients == 4 * rows
    assert whole.optimizer - less.optimizer == 8 * rows
    assert all_bytes - fewer_bytes == 4 * rows
    base = 2 * (2 * 48 * 64 + 64 * 48)  # of LoRA experts, on two layers
    assert whole.weights - whole.gradients == 4 * base
