"""A released model under every dimension of parallelism: each rank reads its own slices, straight into its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from released import mixtral, read
from support import changed

from moesys.config import Config
from moesys.config.load import load
from moesys.hub.fit import fit
from moesys.hub.folder import open_folder
from moesys.hub.mapping import whole
from moesys.hub.weights import ReleasedWeights
from moesys.parallel.dimension import check

TWO: dict[str, dict[str, Any]] = {"tp 2": {"tp": 2}, "ep 2": {"ep": 2}, "cp 2": {"cp": 2}}
FOUR: dict[str, dict[str, Any]] = {
    "ep 4": {"ep": 4},
    "etp 2, ep 2": {"etp": 2, "ep": 2},
    "pp 2, ep 2": {"pp": 2, "ep": 2},
    "shards 2, ep 2": {"dp_shard": 2, "ep": 2},
    "tp 2, all shards, ep 2": {"tp": 2, "dp_shard": "full", "ep": 2},
}
MEGATRON: dict[str, dict[str, Any]] = {"megatron, tp 2, ep 2": {"tp": 2, "ep": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "mixtral"
    mixtral(path)
    return path


def configuration(small: dict, folder: Path, world: int, parallel: dict[str, Any], engine: str = "native") -> Config:
    path = folder.parent / "run.yaml"
    path.write_text(f"model: {{from: {folder}}}\n")
    model = load(path).config
    run = {k: v for k, v in small.items() if k != "model"}
    run = changed(run, {"engine": engine, "parallel": parallel, "cluster": {"ranks_per_node": world}})
    run["train"] = {"global_batch": 8, "seq_len": 16, "init": model.train.init}
    config = Config.model_validate(run | {"model": model.model.model_dump()})
    assert check(config) == []
    return config


@pytest.fixture(scope="module")
def found(small: dict, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {}
    for world, cases in ((2, TWO), (4, FOUR)):
        configs = {name: configuration(small, folder, world, parallel) for name, parallel in cases.items()}
        if world == 4:
            configs |= {n: configuration(small, folder, 4, p, "megatron") for n, p in MEGATRON.items()}
        results |= read(configs, world, tmp_path_factory.mktemp(f"read-{world}"))
    return results


@pytest.fixture(scope="module")
def single(folder: Path, small: dict) -> dict[str, torch.Tensor]:
    """Every weight, read whole in one process."""
    config = configuration(small, folder, 1, {})
    source = ReleasedWeights(fit(open_folder(folder), config.model, 320))
    weights = {}
    for weight in source.fit.family.weights(config.model, 320):
        weights[weight.name] = torch.full(weight.shape, torch.nan)
        source.read_into(weights[weight.name], weight.name, whole(weight.shape))
    return weights


CASES = [*TWO, *FOUR, *MEGATRON]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_its_slices_of_what_one_process_reads(name, found, single):
    for rank in found[name]:
        for weight, part, at in rank["held"]:
            assert torch.equal(part, single[weight][at]), weight
    whole_model = {weight for rank in found[name] for weight, _, _ in rank["held"]}
    assert whole_model == set(single)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_reads_the_bytes_of_its_slices_and_no_more(name, found):
    for rank in found[name]:
        assert rank["bytes"] == sum(part.nbytes for _, part, _ in rank["held"])


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_beside_its_shards_a_rank_holds_a_part_of_one_tensor_at_most(name, found):
    for rank in found[name]:
        assert rank["embedding"] == 320 * 32 * 4, "a copy of a tensor is seen"
        assert rank["peak"] <= rank["embedding"] + 0.05 * sum(part.nbytes for _, part, _ in rank["held"])
