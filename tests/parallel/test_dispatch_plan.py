"""What dispatchers need, round and reach, without any process group."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from support import changed

from moesys.config import Config
from moesys.errors import MoesysError
from moesys.parallel import dimension, nodes
from moesys.parallel.degrees import resolve
from moesys.parallel.dispatchers.build import dispatchers
from moesys.parallel.dispatchers.chunks import chunk_bounds, chunk_of
from moesys.parallel.dispatchers.kinds.hierarchical import reached
from moesys.parallel.dispatchers.payload import Fp8Rows


def config(small: dict, dispatch: dict, parallel: dict, nodes: int, per_node: int, moe: dict | None = None) -> Config:
    cluster = {"nodes": nodes, "ranks_per_node": per_node}
    change = {"parallel": {**parallel, "dispatch": dispatch}, "cluster": cluster, "model": {"moe": moe or {}}}
    return Config.model_validate(changed(small, change))


def test_more_chunks_than_tokens_are_refused(small):
    c = config(small, {"kind": "all_to_all", "chunks": 9}, {"ep": 2, "tp": 2}, 1, 2)
    (problem,) = dimension.check(c)
    rule = (
        "a rank has train.micro_batch(1) · train.seq_len(16) / (cp(1) · tp(2)) = 8 tokens at once, fewer than chunks(9)"
    )
    assert (problem.key, problem.rule, problem.remedy) == ("parallel.dispatch.chunks", rule, "choose at most 8")


def test_groups_that_lie_unevenly_on_nodes_have_no_two_levels(small):
    uneven = config(small, {"kind": "hierarchical"}, {"ep": 4}, 4, 3)
    (problem,) = (p for p in dimension.check(uneven) if p.key == "parallel.dispatch.kind")
    assert (
        "expert groups of ep(4) · etp(1) = 4 ranks have unequal parts on nodes of cluster.ranks_per_node(3)"
        in problem.rule
    )
    assert problem.remedy == "make ep · etp a multiple or a divisor of 3, or use dispatch: all_to_all"
    for per_node in (1, 2, 4):
        assert dimension.check(config(small, {"kind": "hierarchical"}, {"ep": 4}, 8 // per_node, per_node)) == []


@pytest.mark.parametrize(("ep", "etp", "per_node"), [(4, 1, 2), (2, 2, 2), (2, 2, 1), (4, 2, 4), (4, 1, 4), (2, 4, 2)])
def test_rows_of_each_level_are_the_mean_over_all_choices(small, ep, etp, per_node):
    size, experts, top_k = ep * etp, 8, 3
    moe = {"experts": experts, "top_k": top_k}
    c = config(small, {"kind": "hierarchical"}, {"ep": ep, "etp": etp}, size // per_node, per_node, moe)
    degrees, _ = resolve(c)
    chosen = list(combinations(range(experts), top_k))
    holders = [{e // (experts // ep) * etp + j for e in choice for j in range(etp)} for choice in chosen]
    ranks = sum(map(len, holders)) / len(chosen)
    between = sum(len({rank // per_node for rank in held}) for held in holders) / len(chosen)
    expected = {"inter": between, "intra": ranks}
    if per_node == size:
        del expected["inter"]
    if per_node == 1:
        del expected["intra"]
    (shape,) = dimension.step_shape(c, degrees, 320, 0)
    assert reached(shape) == pytest.approx(expected)


@pytest.mark.parametrize("hidden", [1, 64, 128, 200, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_round_each_element_by_a_sixteenth_at_most(hidden, dtype):
    x = torch.randn(50, hidden, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-20, 20, 50)[:, None]
    x = x.to(dtype)
    x[3] = 0
    codec = Fp8Rows(hidden, dtype)
    written = codec.encode(x)
    assert written.dtype == torch.uint8
    assert written.shape == (50, hidden + 4 * -(-hidden // 128))
    read = codec.decode(written)
    assert read.dtype == dtype
    blocks = torch.nn.functional.pad(x.double(), (0, -hidden % min(128, hidden))).unflatten(1, (-1, min(128, hidden)))
    # Below the least normal number, 2⁻⁶, steps are 2⁻⁹ of the scale, which is at most 1/224 of the block's largest.
    least = (blocks.abs().amax(-1, keepdim=True) / 224 * 2.0**-10).expand_as(blocks).flatten(1)[:, :hidden]
    error = (read.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() / 16, least)).all()
    rows = error.norm(dim=1) / x.double().norm(dim=1).clamp(min=1e-30)
    assert rows.max() < 1 / 16 and rows.mean() < 0.03
    assert torch.equal(codec.decode(codec.encode(read)), read), "what was rounded once is not rounded again"


def test_one_row_or_none_can_be_read():
    for rows in (0, 1):
        x = torch.randn(rows, 130)
        assert Fp8Rows(130, torch.float32).decode(Fp8Rows(130, torch.float32).encode(x)).shape == x.shape


def test_chunks_are_consecutive_and_nearly_equal():
    for tokens in (0, 1, 5, 16):
        for chunks in (1, 2, 3, 7):
            ends = chunk_bounds(tokens, chunks)
            expected = [c for c in range(chunks) for _ in range(ends[c + 1] - ends[c])]
            assert chunk_of(torch.arange(tokens), tokens, chunks).tolist() == expected
            assert max(b - a for a, b in pairwise(ends)) <= -(-tokens // chunks)


def test_where_a_rank_runs(small, monkeypatch):
    cluster = config(small, {}, {}, 2, 2).cluster
    for key in ("LOCAL_WORLD_SIZE", "MOESYS_NODES", "MOESYS_NODE_IP"):
        monkeypatch.delenv(key, raising=False)
    # All ranks on this machine: nodes as the configuration has them.
    assert [nodes.here(rank, 4, cluster) for rank in range(4)] == ["0", "0", "1", "1"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MOESYS_NODE_IP", "10.0.0.1")
    assert nodes.here(0, 4, cluster) == nodes.here(3, 4, cluster)
    assert nodes.here(0, 4, cluster).startswith("10.0.0.1 ")
    monkeypatch.setenv("MOESYS_NODES", "0,1,1,0")
    assert [nodes.here(rank, 4, cluster) for rank in range(4)] == ["0", "1", "1", "0"]
    assert nodes.members("0110") == [[0, 3], [1, 2]]
    assert nodes.even("0110") and not nodes.even("0111")


def test_an_unknown_dispatcher_is_one_message():
    said = r"parallel.dispatch.kind is 'ring': must be one of all_gather, all_to_all, hierarchical"
    with pytest.raises(MoesysError, match=said):
        dispatchers(None, torch.device("cpu"), kind="ring")  # type: ignore[arg-type]  # before anything asks the group
