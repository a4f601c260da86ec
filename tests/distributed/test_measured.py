"""RecordedStep steps of real processes against what was done to them on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from measured import DELAY_S, record
from support import changed

from moesys.config.schema import Config
from moesys.data.corpus import open_corpus
from moesys.measure.explain.averages import explain
from moesys.measure.explain.explanation import Explanation
from moesys.measure.explain.matching import match_collectives
from moesys.measure.explain.summarise import summarised
from moesys.measure.record.step_files import read_steps, summaries
from moesys.measure.step import Step
from moesys.models.size import weights

STEPS = 6
LATE_STEPS = 9

FOLDER: list[Path] = []
"""Where the scenarios were recorded."""

LATE = "rank 1 late before layers.2"
OVERLOADED = {
    "model": {"moe": {"experts": 4, "top_k": 1, "ffn_hidden": 2048, "gate": {"force": "skewed", "skew": 60.0}}},
    "train": {"seq_len": 256, "global_batch": 4},
}


@pytest.fixture(scope="module")
def recorded(small: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Step]]:
    """RecordedStep steps of two ranks that share the experts, by scenario; the first step is left out."""
    measured = {"every": 1}
    base = changed(small, {"parallel": {"ep": 2}, "train": {"global_batch": 2, "steps": STEPS}, "measure": measured})
    one, short = {"train": {"global_batch": 1}}, {"train": {"steps": 2}}
    late = changed(base, {"train": {"steps": LATE_STEPS}})
    scenarios = {
        "late": (late, LATE),
        "audited": (changed(late, {"measure": {"audit": True}}), LATE),
        "overloaded": (changed(base, OVERLOADED), "nothing"),
        "sharded": (changed(base, {"parallel": {"dp_shard": "full"}}), "nothing"),
        "tensor": (changed(base, {"parallel": {"tp": 2, "sp": True}}, one), "nothing"),
        "context": (changed(base, {"parallel": {"cp": 2}}, one), "nothing"),
        "pipeline": (changed(base, {"parallel": {"pp": 2, "ep": 1}}), "nothing"),
        # The ranks that split tensors or the context are also those that hold copies of the experts: one group.
        "tensor over all": (changed(base, {"parallel": {"tp": 2, "sp": True, "ep": 1}}, one, short), "nothing"),
        "context over all": (changed(base, {"parallel": {"cp": 2, "ep": 1}}, one, short), "nothing"),
    }
    folder = tmp_path_factory.mktemp("measured")
    record(scenarios, 2, folder)
    FOLDER.append(folder)
    return {name: read_steps(folder / name)[1:] for name in scenarios}


def middle(steps: list[Step], figure) -> float:
    """Median over steps of a figure of each one's explanation: the machine is shared."""
    return median(figure(explain([step])) for step in steps)


def phase(e: Explanation, layer: str, part: str, backward: bool = False):
    return next(x for x in e.phases if (x.layer, x.part, x.backward) == (layer, part, backward))


def lates(e: Explanation) -> list[float]:
    """Rank 0's seconds of waiting for who is late, by phase."""
    return [x.by_rank[0].late for x in e.phases]


@pytest.mark.parametrize("scenario", ["late", "audited"])
def test_a_late_rank_is_found_with_its_layer_and_its_delay(recorded: dict, scenario: str) -> None:
    """More than all else that a shared machine adds: exact seconds are for made-up steps, in tests/measure."""
    steps = recorded[scenario]
    late = middle(steps, lambda e: phase(e, "layers.2", "dispatch").by_rank[0].late)
    assert late > 0.5 * DELAY_S
    assert middle(steps, lambda e: phase(e, "layers.2", "dispatch").by_rank[1].late) < late
    assert middle(steps, lambda e: sum(x.by_rank[0].uneven for x in e.phases)) < late
    assert late == max(middle(steps, lambda e, n=n: lates(e)[n]) for n in range(len(lates(explain(steps)))))
    e = explain(steps)
    assert e.waited_for[1] > e.waited_for[0]
    assert "waiting for rank 1, which arrives late" in e.sentence
    assert e.audit == (scenario == "audited")


def test_a_gate_forced_onto_one_expert_is_imbalance(recorded: dict) -> None:
    """In the steps that the machine disturbed least."""
    calm = sorted(recorded["overloaded"], key=lambda step: explain([step]).causes.late)[:2]
    e = explain(calm)
    for layer in e.layers:
        assert (layer.rank_imbalance, layer.expert_imbalance) == (2.0, 4.0)
        assert (layer.busiest_rank, layer.busiest_expert) == (0, 0)
        assert layer.even_seconds < layer.seconds
    waits = phase(e, "layers.2", "combine").by_rank
    assert waits[1].uneven > waits[0].uneven
    assert e.causes.uneven > e.causes.late
    assert "the busiest expert 4 times (mostly expert 0)" in e.sentence


@pytest.mark.parametrize(
    ("scenario", "kinds"),
    [
        ("late", {"data"}),
        ("sharded", {"data"}),
        ("tensor", {"tensor"}),
        ("context", {"data", "context"}),
        ("pipeline", {"pipeline"}),
        ("tensor over all", {"tensor", "data"}),
        ("context over all", {"context", "data"}),
    ],
)
def test_other_communication_is_told_by_its_kind(recorded: dict, scenario: str, kinds: set[str]) -> None:
    e = explain(recorded[scenario])
    assert {kind for kind, seconds in e.total.others.items() if seconds > 0} == kinds
    assert (e.total.bubble > 0) == (scenario == "pipeline")


def test_the_parts_add_up_to_the_step(recorded: dict) -> None:
    for steps in recorded.values():
        for b in (*explain(steps).by_step, *explain(steps).by_rank):
            assert sum(b.parts.values()) == pytest.approx(b.step, rel=0.02)
            assert min(b.parts.values()) > -1e-12


def test_exchanged_arrivals_equal_those_matched_from_all_ranks(recorded: dict) -> None:
    """Rank 0 had sums alone, of which each rank made its own; here they are made again of every rank's collectives."""
    for scenario, steps in recorded.items():
        exchanged = summaries(FOLDER[-1] / scenario)[1:]
        assert [s.number for s in exchanged] == [s.number for s in steps]
        alone = [replace(s, ranks=tuple(replace(r, arrivals=None) for r in s.ranks)) for s in steps]
        for mine, theirs in zip(exchanged, map(summarised, alone), strict=True):
            assert mine.number == theirs.number
            for a, b in zip(leaves(vars(mine)), leaves(vars(theirs)), strict=True):
                assert a == (pytest.approx(b, abs=1e-9) if isinstance(b, float) else b), scenario


def leaves(value: object) -> Iterator[object]:
    """Numbers and words of nested lists and mappings, in order."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_no_rank_reads_the_collectives_of_another(recorded: dict) -> None:
    folder = FOLDER[-1] / "late" / "measure"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000.npy", "rank-00001.npy", "summary.jsonl"]
    for rank in (0, 1):
        alone = FOLDER[-1] / f"alone-{rank}" / "measure"
        alone.mkdir(parents=True)
        (alone / f"rank-{rank:05d}.npy").write_bytes((folder / f"rank-{rank:05d}.npy").read_bytes())
        assert {tuple(s.members) for s in read_steps(alone.parent)} == {(rank,)}
    # What a rank alone has on file still tells for whom it waited.
    e = explain(read_steps(FOLDER[-1] / "alone-0")[1:])
    assert e.causes.late > explain(recorded["late"]).causes.late, "of rank 0 alone, not a mean of both"
    assert e.causes.unattributed == 0


def test_every_collective_was_seen_by_all_its_ranks(recorded: dict) -> None:
    for scenario, steps in recorded.items():
        for step in steps:
            for key, collectives in match_collectives(step).items():
                assert set(collectives) == set(next(iter(collectives.values())).ranks), (scenario, key)
                assert len({(t.layer, t.part, t.backward) for t in collectives.values()}) == 1, (scenario, key)


def test_bytes_are_those_of_the_routing(recorded: dict, small: dict) -> None:
    """All tokens of both ranks go to expert 0: rank 1 sends every row in float32, and rank 0 sends it back."""
    hidden, tokens = small["model"]["hidden"], 2 * 256
    step = recorded["overloaded"][0]
    rows = [t for t in step.ranks[1].collectives if t.kind == "all_to_all" and t.part == "dispatch" and not t.backward]
    assert sum(t.sent[0] for t in rows) == tokens * hidden * 4 * 4  # over four layers
    back = [t for t in step.ranks[0].collectives if t.kind == "all_to_all" and t.part == "combine" and not t.backward]
    assert sum(t.sent[1] for t in back) == tokens * hidden * 4 * 4


def test_a_sum_of_gradients_counts_their_bytes_once(recorded: dict, small: dict) -> None:
    """Every dense parameter in float32: what is reduced, not as often as there are ranks."""
    sums = [t for t in recorded["late"][0].ranks[0].collectives if t.purpose == "data" and t.kind == "all_reduce"]
    config = Config.model_validate(small)
    dense = [w for w in weights(config.model, open_corpus(config).vocab_size) if not w.routed]
    assert sum(t.bytes for t in sums) == 4 * sum(w.numel for w in dense)
