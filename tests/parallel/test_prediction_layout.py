"""Multi-token prediction in layouts: where its blocks lie, and what is refused. Needs no torch."""

from __future__ import annotations

import pytest
from support import changed

from moesys.config import Config
from moesys.parallel import dimension
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape

RAW: dict = {
    "model": {"hidden": 32, "layers": 4, "ffn_hidden": 64, "attention": {"heads": 4}, "mtp": {"depth": 2}},
    "train": {"seq_len": 16, "global_batch": 8},
    "cluster": {"device": "cpu"},
}
PIPELINE: dict = {"parallel": {"pp": 2}, "cluster": {"ranks_per_node": 2}}


def test_the_last_stage_has_its_blocks_and_the_embedding() -> None:
    config = Config.model_validate(changed(RAW, PIPELINE))
    degrees, _ = resolve(config)
    assert degrees is not None
    (first,), (last,) = (step_shape(config, degrees, 320, rank) for rank in range(2))
    assert (first.stage.layers, last.stage.layers) == (range(3), range(3, 6))  # 4 and 5, and two more heads, weigh
    names = [{w.name for w in shape.weights()} for shape in (first, last)]
    assert names[0] & names[1] == {"embed.weight"}
    assert {"layers.5.project.weight", "layers.5.norm.weight", "head.weight"} <= names[1]
    split = Config.model_validate(changed(RAW, PIPELINE, {"parallel": {"pp_split": [2, 2]}}))
    assert dimension.check(split) == []
    assert [shape.stage.layers for rank in range(2) for shape in step_shape(split, degrees, 320, rank)] == [
        range(2), range(2, 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "key", "rule"),
    [
        ({"train": {"seq_len": 2}}, "model.mtp.depth", "must be less than train.seq_len(2), or there is no token"),
        ({"engine": "megatron"}, "model.mtp", "multi-token prediction is not in engine: megatron"),
        (
            changed(PIPELINE, {"parallel": {"pp_schedule": "zero-bubble"}}),
            "parallel.pp_schedule",
            "goes with multi-token prediction of depth 1, and with a head of its own",
        ),
        (
            changed(PIPELINE, {"model": {"mtp": {"depth": 1}, "tie_embeddings": True}},
                    {"parallel": {"pp_schedule": "zero-bubble"}}),
            "parallel.pp_schedule",
            "goes with multi-token prediction of depth 1, and with a head of its own",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(change: dict, key: str, rule: str) -> None:
    (problem,) = dimension.check(Config.model_validate(changed(RAW, change)))
    assert problem.key == key and problem.rule.startswith(rule) and problem.remedy
