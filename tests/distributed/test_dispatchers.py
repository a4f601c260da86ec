"""Every dispatcher against the definition of a layer of experts, in real processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import drawn
import pytest
import torch
import yaml
from all_gates import traces
from dispatcher_ranks import KINDS_OF_LAYOUTS, LAYOUTS, ROUTINGS, TYPES, E, F, H, everything, routing, whole
from drawn import Case
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ran import Ran
from standing import Standing
from support import changed

from moesys import cli
from moesys.config import Config
from moesys.config.registry import DISPATCHERS, kinds
from moesys.parallel import dimension
from moesys.parallel.dispatchers.all_to_all import by_expert, transpose_blocks
from moesys.train import verify


@pytest.fixture(scope="module")
def ranks() -> Iterator[Standing]:
    standing = Standing(4)
    yield standing
    standing.close()


@pytest.fixture(scope="module")
def found(ranks) -> list[dict]:
    return ranks.ask(everything)


@pytest.mark.parametrize("kind,count", ROUTINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_computes_the_definition(found, name, kind, count):
    expected = whole(4, count, kind)
    _, _, ep, etp = LAYOUTS[name]
    for chunks in (1, 3):
        fc1, fc2 = torch.zeros_like(expected["fc1"]), torch.zeros_like(expected["fc2"])
        for rank, every in enumerate(found):
            mine = every[name, chunks, kind, count]
            for key in ("out", "x", "weight"):
                torch.testing.assert_close(mine[key], expected[f"{key} {rank}"], rtol=1e-12, atol=1e-12)
            i, j = divmod(rank, etp)
            experts, inner = slice(i * E // ep, (i + 1) * E // ep), slice(j * F // etp, (j + 1) * F // etp)
            fc1[experts, :, :, inner], fc2[experts, inner] = mine["fc1"], mine["fc2"]
        torch.testing.assert_close(fc1, expected["fc1"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fc2, expected["fc2"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [[[2, 0, 3], [1, 4, 0]], [[0, 0], [0, 0]], [[1, 2, 3]], [[5], [1]], [[3, 1]] * 4])
def test_rows_come_into_the_experts_order_alike_by_index_and_by_blocks(blocks):
    """GPUs gather rows by index as they multiply; elsewhere whole blocks are moved."""
    received = torch.tensor(blocks)
    number = torch.arange(received.numel()).view_as(received)
    rows = torch.repeat_interleave(number.flatten(), received.flatten()).double().requires_grad_()
    expected = torch.repeat_interleave(number.t().flatten(), received.t().flatten()).double()
    order = by_expert(received, len(rows))
    assert torch.equal(order.counts_E, received.sum(0))
    weight = torch.rand(len(rows), dtype=torch.float64)
    for moved in (rows[order.token_A], transpose_blocks(rows, blocks)):
        assert torch.equal(moved, expected)
        (grad,) = torch.autograd.grad(moved, rows, weight)
        assert torch.equal(grad, weight[order.row_A])
    assert torch.equal(transpose_blocks(expected, list(zip(*blocks, strict=True))), rows)


FEW = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # after a failure processes start anew: too slow to shrink an example
    suppress_health_check=list(HealthCheck),
)
UNEVEN = st.tuples(*[st.integers(0, 6)] * 4)
TOKENS = st.one_of(UNEVEN, st.sampled_from([(1, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0), (3, 3, 3, 3), (5, 1, 1, 1)]))


def cases(kind: str) -> st.SearchStrategy[Case]:
    """Any number of tokens on each rank, none included, of any size, which choose any experts."""
    return st.builds(
        Case,
        kind=st.just(kind),
        nodes=st.sampled_from(["0011", "0101", "0110", "0123", "0000", "0001"] if kind == "hierarchical" else [""]),
        ep=st.sampled_from([4, 2, 1]),
        chunks=st.integers(1, 3),
        payload=st.sampled_from(["model", "fp8"]),
        tokens=TOKENS,
        local=st.integers(2, 3),
        hidden=st.sampled_from([1, 8, 130]),
        choice=st.sampled_from(["one", "two", "every expert", "the last expert", "any number"]),
        rows=st.sampled_from([False, False, False, True]),
        seed=st.integers(0, 9),
    )


@pytest.mark.parametrize("kind", kinds(DISPATCHERS))
@FEW
@given(data=st.data())
def test_computes_the_definition_of_any_case(ranks, kind, data):
    check_case(ranks, data.draw(cases(kind)))


@pytest.mark.parametrize(
    "case",
    [
        Case("all_gather", chunks=2, tokens=(3, 2, 3, 2)),
        Case("all_to_all", chunks=3, tokens=(1, 0, 0, 0), payload="fp8"),
        Case("hierarchical", tokens=(0, 0, 0, 0), payload="fp8"),
    ],
    ids=["chunks of unequal sizes", "a chunk without tokens", "no tokens"],
)
def test_computes_the_definition_of_cases_that_failed_once(ranks, case):
    check_case(ranks, case)


def check_case(ranks: Standing, case: Case) -> None:
    """The ranks' results and gradients against the definition."""
    each, fc1, fc2 = drawn.definition(case)
    for rank, mine in enumerate(ranks.ask(drawn.computed, case)):
        experts, inner = drawn.slices(case, rank)
        expected = each[rank] | {"fc1": fc1[experts, :, :, inner], "fc2": fc2[experts, inner]}
        for key, value in mine.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def between_nodes(found: list[dict], name: str, node: str) -> Counter[str]:
    """Bytes that left the node of their rank in one forward and backward pass, by what they are."""
    total: Counter[str] = Counter()
    for rank, every in enumerate(found):
        for event in every["events"][name]:
            away = zip(event.ranks, event.sent, strict=True)
            total[event.kind] += sum(n for peer, n in away if node[peer] != node[rank])
    return total


@pytest.mark.parametrize("node", ["0011", "0123"])
def test_a_token_crosses_between_nodes_once_per_node(found, node):
    flat = hierarchical = 0
    for rank in range(4):
        token, expert, _ = routing(rank, 13, "top_k")
        there = [(t, node[e // (E // 4)]) for t, e in zip(token.tolist(), expert.tolist(), strict=True)]
        away = [pair for pair in there if pair[1] != node[rank]]
        flat, hierarchical = flat + len(away), hierarchical + len(set(away))
    pairs, rails = (8, 4) if node == "0011" else (12, 12)  # of ranks on different nodes; those that exchange rows
    tables = 1 + 2 + 2 if node == "0011" else 1 + 1  # rows; rows and assignments by rank of the node
    # A row goes there and its result returns; so do their gradients. Counts are int64 and have no gradients.
    row, weight, label = 4 * 4 * H, 4, 8 + 4
    expected = {"counts": 8 * pairs * E // 4, "weights": flat * (weight + weight), "rows": flat * row}
    assert bytes_of(between_nodes(found, "all_to_all", node)) == expected
    levels = "2 nodes of 2" if node == "0011" else "4 nodes"
    # Names travel beside weights, of which alone there are gradients.
    expected = {"counts": 8 * rails * tables, "weights": flat * (label + weight), "rows": hierarchical * row}
    assert bytes_of(between_nodes(found, levels, node)) == expected
    assert hierarchical < flat


def bytes_of(kinds: Counter[str]) -> dict[str, int]:
    """Bytes of all-to-alls; nothing else may be sent."""
    names = {"all_to_all_counts": "counts", "all_to_all_weights": "weights", "all_to_all": "rows"}
    return {names[kind]: size for kind, size in kinds.items()}


@pytest.mark.parametrize("node", ["0011", "0123"])
def test_a_gathered_token_goes_to_every_rank(found, node):
    most = max(len(routing(rank, 13, "top_k")[0]) for rank in range(4))
    away = sum(node[a] != node[b] for a in range(4) for b in range(4))
    rows = away * 13 * 4 * H
    assert between_nodes(found, "all_gather", node) == {
        "all_gather_counts": away * 8 * (E + 1),  # of each place, and of tokens
        "all_gather_names": away * 8 * most,
        "all_gather_weights": away * 4 * most,
        "reduce_scatter_weights": away * 4 * most,
        "all_gather": 2 * rows,
        "reduce_scatter": 2 * rows,
    }


@pytest.mark.parametrize("payload", ["model", "fp8"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", KINDS_OF_LAYOUTS)
def test_rows_travel_in_the_type_of_the_model_or_in_eight_bits_with_scales(found, name, dtype, payload):
    """Dispatch alone is encoded: results and gradients keep the type of the model."""
    plain = dtype.itemsize * H
    seen = set()
    for every in found:
        events = zip(every["types"][name, dtype, payload], every["events"][name], strict=True)
        for event, in_float32 in events:
            if event.kind in ("all_to_all", "all_gather", "reduce_scatter"):
                there = event.tag.part == "dispatch" and not event.tag.backward
                row = H + 4 if there and payload == "fp8" else plain
                assert event.sent == tuple(n // (4 * H) * row for n in in_float32.sent)
                seen.add((event.tag.part, event.tag.backward, sum(event.sent) > 0))
            else:  # counts, names and weights do not depend on it
                assert event.sent == in_float32.sent
    assert seen == {(part, backward, True) for part in ("dispatch", "combine") for backward in (False, True)}


def test_levels_are_named_by_where_rows_go(found):
    names = {name: Counter(e.tag.level for e in found[0]["events"][name] if e.kind == "all_to_all") for name in LAYOUTS}
    assert names["all_to_all"] == names["uneven nodes"] == {"flat": 4}
    assert names["2 nodes of 2"] == names["slices on 2 nodes"] == {"inter": 4, "intra": 4}
    assert names["4 nodes"] == {"inter": 4} and names["1 node"] == {"intra": 4}
    gathered = Counter(e.kind for e in found[0]["events"]["all_gather"])
    assert gathered["all_gather"] == gathered["reduce_scatter"] == 2


def test_counts_are_exchanged_once_per_level_whatever_the_chunks(found):
    for every in found:
        _, kinds, _, _ = every["unwaited"]["2 nodes of 2"]
        assert kinds.count("all_to_all_counts") == 2 * 2, "two levels, forward and recomputed"


@pytest.mark.parametrize("name", KINDS_OF_LAYOUTS)
def test_shared_work_runs_while_rows_travel_in_both_directions(found, name):
    for every in found:
        beside, after = every["shared"][name][True], every["shared"][name][False]
        assert torch.equal(beside["out"], after["out"])
        torch.testing.assert_close(beside["x"], after["x"], rtol=1e-14, atol=1e-14)
        for moment in beside["times"]:
            flying = [kind for kind, begin, waited in beside["spans"] if begin < moment < waited]
            assert flying, f"nothing travels while the shared part runs: {beside}"
        assert len(beside["times"]) == 2
        assert not [kind for kind, begin, waited in after["spans"] if begin < after["times"][0] < waited]


@pytest.mark.parametrize("name", KINDS_OF_LAYOUTS)
def test_recomputation_that_ends_early_leaves_no_collective_unwaited(found, name):
    expected = whole(4, 13, "top_k")
    for rank, every in enumerate(found):
        left, _, x, fc1 = every["unwaited"][name]
        assert left == 0
        torch.testing.assert_close(x, expected[f"x {rank}"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fc1, expected["fc1"][rank * E // 4 : (rank + 1) * E // 4], rtol=1e-12, atol=1e-12)


def test_eight_bits_change_results_by_little_and_alike_in_every_layout(found):
    for every in found:
        exact = every["fp8"]["all_to_all"]["model"]
        flat = every["fp8"]["all_to_all"]["fp8"]
        # A ReLU's derivative jumps where rounding turns a sign: the gradient of x bears more.
        for key, most in (("out", 0.06), ("weight", 0.06), ("x", 0.25)):
            error = (flat[key] - exact[key]).norm() / exact[key].norm()
            assert 1e-3 < error < most, (key, error)
        for other in ("all_gather", "2 nodes of 2"):
            # Rows that are written twice, once per level, are rounded once.
            for key, value in every["fp8"][other]["fp8"].items():
                torch.testing.assert_close(value, flat[key], rtol=1e-4, atol=1e-5)


MODEL = {"experts": 8, "ffn_hidden": 16, "capacity_factor": 1.0, "shared_experts": 1, "balance_loss": 0.02}
RUNS: dict[str, tuple[int, dict, str]] = {
    "chunks on 2 nodes": (2, {"ep": 4, "dispatch": {"kind": "hierarchical", "chunks": 3}}, "selective"),
    "slices of 2 nodes": (2, {"tp": 2, "ep": 2, "etp": 2, "dispatch": "hierarchical"}, "none"),
    "4 nodes": (4, {"ep": 4, "dispatch": {"kind": "hierarchical", "chunks": 2}}, "full"),
    "1 node": (1, {"cp": 2, "ep": 4, "dispatch": "hierarchical"}, "selective"),
    "gathered chunks": (1, {"tp": 2, "ep": 2, "etp": 2, "dispatch": {"kind": "all_gather", "chunks": 2}}, "selective"),
    "chunks": (1, {"ep": 2, "dispatch": {"chunks": 3, "overlap_shared": False}}, "full"),
}
"""Nodes that four ranks play, changes to parallel, and what is recomputed."""


def run(small: dict, nodes: int, parallel: dict, recompute: str) -> Config:
    change = {
        "model": {"hidden": 32, "layers": 2, "attention": {"heads": 2, "kv_heads": 2}, "moe": MODEL},
        "train": {"global_batch": 4, "micro_batch": 1, "recompute": recompute},
        "parallel": parallel,
        "cluster": {"nodes": nodes, "ranks_per_node": 4 // nodes},
    }
    config = Config.model_validate(changed(small, change))
    assert dimension.check(config) == []
    return config


@pytest.fixture(scope="module")
def ran() -> dict[str, Ran]:
    return {}


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory, ran) -> dict[str, verify.Trace]:
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: run(small, *case) for name, case in RUNS.items()}
    alone = {"alone": verify.reference(configs["chunks"])}
    return traces(configs, 4, 2, folder / "together", ran) | traces(alone, 1, 2, folder / "alone")


@pytest.mark.parametrize("name", RUNS)
def test_training_equals_one_process(runs, name):
    report = verify.compare(runs[name], runs["alone"], 4, verify.TOLERANCES["float64"])
    assert report.passed, report


@pytest.mark.parametrize("name", RUNS)
def test_does_what_its_budget_says(runs, ran, name, budgets):
    budgets.check(f"dispatch in {name}", ran[name])


def test_a_pipeline_of_two_levels_equals_one_process(small):
    parallel = {"pp": 2, "pp_schedule": "zero-bubble", "ep": 2, "dispatch": {"kind": "hierarchical", "chunks": 2}}
    config = run(small, 4, parallel, "none")
    report = verify.verify(config, 4, 2, verify.TOLERANCES["float32"])
    assert report.passed, report


def test_what_eight_bits_change_is_not_called_equal(small, tmp_path, capsys):
    raw = changed(small, {"cluster": {"ranks_per_node": 2}, "parallel": {"ep": 2, "dispatch": {"payload": "fp8"}}})
    path = tmp_path / "fp8.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert cli.main(["verify", str(path), "--steps", "1"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "parallel.dispatch.payload is fp8: rounds rows to 4 significant bits" in told
    assert "remedy: add parallel.dispatch.payload=model" in told
    assert cli.main(["verify", str(path), "--steps", "1", "--tolerance", "0.3"]) == 0
    assert cli.main(["verify", str(path), "parallel.dispatch.payload=model", "--steps", "1"]) == 0
