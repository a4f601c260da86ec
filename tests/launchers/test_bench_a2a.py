"""`moesys bench a2a` in real processes: agrees with a bare loop, validates, and writes what is read elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from support import changed

from moesys.cli import main
from moesys.config.schema import Config
from moesys.launchers.bench_a2a import routed
from moesys.train import routing_files

TRIES = 4
"""The machine is shared."""


@pytest.fixture
def config(small: dict, tmp_path: Path) -> Path:
    raw = changed(small, {"cluster": {"ranks_per_node": 2}, "parallel": {"ep": 2}, "launch": {"launcher": "local"}})
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(changed(raw, {"output": {"runs": str(tmp_path / "runs")}})))
    return path


def measure(config: Path, *words: str) -> dict:
    found = config.parent / "a2a.json"
    assert main(["bench", "a2a", str(config), *words, "--json", str(found)]) == 0
    return json.loads(found.read_text())


def test_agrees_with_a_bare_loop_from_a_mebibyte_on(config: Path) -> None:
    words = ["--collectives", "all_to_all", "--groups", "world", "--min", "1M", "--max", "16M", "--plain"]
    runs: list[list[tuple[float, float]]] = []
    for _ in range(TRIES):
        results = measure(config, *words, "--iterations", "30")["results"]
        assert [r["size"] for r in results] == [2**20, 2**22, 2**24]
        runs.append([(r["out_of_place"]["time"] / r["plain_us"], r["plain_noise"]) for r in results])
        # Within 5%, as far as the bare loop agrees with itself.
        if all(abs(ratio - 1) < 0.05 + noise for ratio, noise in runs[-1]):
            return
    pytest.fail(f"medians / those of the bare loop, and by how much these differ, in {TRIES} runs: {runs}")


def test_every_collective_is_right_and_its_bandwidths_are_nccl_tests(config: Path, capsys) -> None:
    told = measure(config, "--min", "1K", "--max", "4K", "--iterations", "3", "--skew", "1", "--dtypes", "bfloat16")
    results = told["results"]
    kinds = {"all_to_all", "all_to_all_uneven", "all_gather", "reduce_scatter", "all_reduce", "send_recv"}
    assert {r["collective"] for r in results} == kinds
    assert {r["group"] for r in results} == {"intra", "expert", "world"}
    assert told["out_of_bounds"] == 0
    factor = {"all_reduce": 1.0, "send_recv": 1.0}  # 2 (n - 1) / n, and none, for two ranks
    for r in results:
        out, per = r["out_of_place"], r["out_of_place_per_iter"]
        assert out["nwrong"] == 0
        assert out["time"] == per["p50_us"]
        assert per["min_us"] <= per["p50_us"] <= per["p95_us"] <= per["max_us"]
        assert out["alg_bw"] == pytest.approx(r["size"] / out["time"] / 1e3)
        assert out["bus_bw"] == pytest.approx(out["alg_bw"] * factor.get(r["collective"], 0.5))
        assert 0 < r["transfer_us"] <= per["max_us"]
        assert len(r["rank_us"]) == 2
    uneven = [r for r in results if r["collective"] == "all_to_all_uneven" and r["group"] == "world"]
    # Both ranks send two thirds to rank 0, which receives that twice.
    assert [r["size"] for r in uneven] == pytest.approx([2 * 1024 * 2 / 3, 2 * 4096 * 2 / 3], abs=8)
    assert "all_reduce, world groups of 2, bfloat16" in capsys.readouterr().out
    assert main(["report", str(config.parent / "a2a.json")]) == 0
    page = (config.parent / "a2a.html").read_text()
    assert "all_reduce, world groups of 2, bfloat16" in page
    assert f"<td>{uneven[0]['out_of_place']['alg_bw']:.3f}</td>" in page


def test_recorded_routing_becomes_a_byte_matrix(tmp_path: Path) -> None:
    """Rank 0's tokens chose experts 0, 0, 1 and 3, rank 1's expert 2 twice; each rank holds two experts."""
    tokens = np.arange(2), np.zeros((2, 2))
    for rank, chosen in enumerate(([[0, 0], [1, 3]], [[2, -1], [2, -1]])):
        routing_files.write(tmp_path, 1, rank, {0: (tokens[0], np.array(chosen, dtype=np.int16), tokens[1])}, 4)
    config = Config.model_validate(
        {
            "model": {"hidden": 8, "layers": 1, "attention": {"heads": 2}, "moe": {"experts": 4, "ffn_hidden": 8}},
            "parallel": {"ep": 2},
            "cluster": {"ranks_per_node": 2},
        }
    )
    assert routed(tmp_path, config) == [[3, 1], [0, 2]]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--matrix", "absent.txt"], "--matrix absent.txt: No such file"),
        (["--min", "4K", "--max", "1K"], "--max 1024 is less than --min 4096"),
        (["--factor", "1"], "--factor must be at least 2"),
        (["cluster.ranks_per_node=1", "parallel.ep=1"], "one rank has nobody to send to"),
    ],
)
def test_what_makes_no_sense_is_said(config: Path, words: list[str], rule: str, capsys) -> None:
    assert main(["bench", "a2a", str(config), *words]) == 2
    assert rule in capsys.readouterr().err


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    from moesys.measure.bench_a2a import Case, Group, Options

    with monkeypatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = Group("world", dist.group.WORLD, [[0]])
        case = Case("all_to_all", group, 64, torch.float32, torch.device("cpu"), Options())
        assert case.wrong() == 0
        plain = case.call

        def spoiled() -> None:
            plain()
            case.out[3] += 1

        monkeypatch.setattr(case, "call", spoiled)
        assert case.wrong() == 1
    finally:
        dist.destroy_process_group()
