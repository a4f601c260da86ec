"""What is told without building a model, against what is built, moved and kept."""

from __future__ import annotations

import pytest
from sabotage import report_layout
from support import changed

from moesys.config import Config
from moesys.data.corpus import vocab_size
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape, traffic

COMBINATIONS = {
    "shard-ep-tp": {"dp_shard": "full", "ep": 2, "tp": 2},
    "pp-etp": {"pp": 2, "etp": 2},
    "hybrid-ep": {"dp_shard": 2, "ep": 4},
    "gathered-ep-etp": {"ep": 2, "etp": 2, "dispatch": {"kind": "all_gather", "chunks": 3}},
    "fp8-ep": {"ep": 4, "dispatch": {"payload": "fp8", "chunks": 2}},
    "two-nodes": {"ep": 4, "dispatch": {"kind": "hierarchical", "chunks": 2}},
}
RECOMPUTED = {"pp-etp": "full", "gathered-ep-etp": "selective", "fp8-ep": "selective", "two-nodes": "full"}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_parameters_and_bytes_on_the_way_to_experts_are_those_of_a_real_step(small, tmp_path, name):
    model = {"attention": {"bias": True}, "moe": {"shared_experts": 1}}
    change = {"parallel": COMBINATIONS[name], "train": {"recompute": RECOMPUTED.get(name, "none")}}
    cluster = {"nodes": 2, "ranks_per_node": 2} if name == "two-nodes" else {"ranks_per_node": 4}
    raw = changed(small, {"model": model, "cluster": cluster}, change)
    config = Config.model_validate(raw)
    measured = report_layout(config, 4, tmp_path)
    degrees, _ = resolve(config)
    for rank, (elements, _) in measured.items():
        shapes = step_shape(
            config,
            degrees,
            vocab_size(config),
            degrees.coordinates(rank, ("pp", "dp_replicate", "dp_shard", "cp", "tp"))["pp"],
        )
        assert sum(shape.held() for shape in shapes) == elements
    # A rank's own rows are not balanced on the way back, but those of all ranks together are known; how many
    # nodes and ranks a token's experts lie on depends on the routing.
    told: dict[str, float] = {}
    for rank in range(degrees.pp):
        for shape in step_shape(config, degrees, vocab_size(config), rank):
            for move in (m for m in traffic(shape) if m.axes == ("ep", "etp") and not m.small):
                key = f"{move.kind} {move.level or 'flat'}"
                told[key] = told.get(key, 0) + move.bytes * move.calls * degrees.stage
    found = {key: sum(sent[key] for _, sent in measured.values()) for key in measured[0][1]}
    assert found == pytest.approx(told, rel=0.15 if name == "two-nodes" else 1e-9)
