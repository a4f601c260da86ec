"""Ranks on nodes, checked against the groups that the meshes themselves list."""

from __future__ import annotations

from itertools import product

import pytest
from support import calls

from moesys.config.schema import ClusterConfig
from moesys.launchers import placement
from moesys.parallel.degrees import EXPERT_AXES, Degrees


def test_ranks_fill_one_node_after_the_other():
    cluster = ClusterConfig(nodes=3, ranks_per_node=4)
    assert placement.place(Degrees(dp_shard=3, tp=4, edp_shard=12), cluster) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


CASES = list(product((1, 2, 3, 8), (1, 2, 4), (1, 2), (2, 3, 4, 8, 24)))


@pytest.mark.parametrize(("tp", "ep", "etp", "per_node"), CASES)
def test_crossings_are_those_of_the_groups(tp, ep, etp, per_node):
    degrees = Degrees(dp_replicate=24 // tp, tp=tp, ep=ep, etp=etp, edp_replicate=24 // (ep * etp))
    found = placement.check(degrees, ClusterConfig(nodes=24 // per_node, ranks_per_node=per_node))
    expected = {
        "warning": spanning(degrees.groups(("tp",)), per_node),
        "note": spanning(degrees.groups(("ep", "etp"), EXPERT_AXES), per_node),
    }
    assert {crossing.severity for crossing in found} == {kind for kind, count in expected.items() if count}
    for crossing in found:
        assert f" {expected[crossing.severity]} of " in f" {crossing.text}"


def spanning(groups: list[list[int]], per_node: int) -> int:
    """How many of `groups` touch more than one node."""
    return sum(len({rank // per_node for rank in group}) > 1 for group in groups)


def test_a_crossing_is_told_with_its_numbers():
    degrees = Degrees(dp_replicate=2, tp=8, ep=16)
    tensor, experts = placement.check(degrees, ClusterConfig(nodes=4, ranks_per_node=4))
    assert str(tensor) == (
        "warning: 2 of 2 tensor groups of tp(8) cross nodes (the first starts at rank 0, on 2 nodes); each layer "
        "waits for its tensor group four times: choose a tp that divides the ranks of a node"
    )
    assert str(experts).startswith("note: 1 of 1 expert groups of ep(16) · etp(1) = 16 cross nodes")
    assert "on 4 nodes" in str(experts)


def test_a_started_run_is_judged_by_its_real_hosts():
    degrees = Degrees(dp_replicate=2, tp=2, edp_replicate=4)
    assert placement.verify_map(degrees, ["a", "a", "b", "b"]) == []
    (crossing,) = placement.verify_map(degrees, ["a", "b", "a", "b"])
    assert crossing.severity == "warning" and "2 of 2 tensor groups" in crossing.text
    with pytest.raises(ValueError, match="3 hosts for a world of 4 ranks"):
        placement.verify_map(degrees, ["a"] * 3)


def test_eight_times_the_ranks_take_eight_times_the_calls():
    counts = []
    for dp, nodes in ((4, 64), (32, 512)):
        degrees = Degrees(pp=16, dp_shard=dp, tp=8, ep=32, edp_shard=dp // 4)
        cluster = ClusterConfig(nodes=nodes, ranks_per_node=8)
        assert len(placement.place(degrees, cluster)) == nodes
        assert [crossing.severity for crossing in placement.check(degrees, cluster)] == ["note"]
        counts.append(calls(lambda d=degrees, c=cluster: (placement.place(d, c), placement.check(d, c))))
    assert counts[1] <= 8 * counts[0] < 200_000
