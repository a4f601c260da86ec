"""Attribution of hand-drawn steps with known answers. Times are in milliseconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.measure.explain.attribution import attributions
from moesys.measure.explain.averages import explain
from moesys.measure.explain.breakdown import breakdown
from moesys.measure.explain.expert_compute import passes
from moesys.measure.explain.intervals import common, length, union, without
from moesys.measure.step import PURPOSES, CollectiveSpan, RankStep, Step

BOTH = (0, 1)


def collective(kind="all_to_all", purpose="expert", number=0, times=(0, 0, 0), sent=(), **more) -> CollectiveSpan:
    begin, waited, end = (t / 1e3 for t in times)
    given = {"ranks": BOTH, "bytes": sum(sent), "sent": sent, **more}
    return CollectiveSpan(kind, purpose, number=number, begin=begin, waited=waited, end=end, **given)


def step(*ranks: tuple[float, list[CollectiveSpan]], hosts=("a", "a"), **more) -> Step:
    made = [RankStep(i, hosts[i], 0.0, end / 1e3, tuple(collectives)) for i, (end, collectives) in enumerate(ranks)]
    return Step(7, tuple(made), **more)


def dispatch(times, sent=(10, 10), **more) -> CollectiveSpan:
    return collective(times=times, sent=sent, layer="layers.2", part="dispatch", level="flat", **more)


def combine(times, sent=(10, 10), number=1, **more) -> CollectiveSpan:
    return collective(times=times, sent=sent, number=number, layer="layers.2", part="combine", level="flat", **more)


def test_a_late_rank_is_waited_for_until_it_begins() -> None:
    e = explain([step((100, [dispatch((10, 10, 65))]), (100, [dispatch((60, 60, 65))]))])
    (phase,) = e.phases
    assert (phase.layer, phase.part, phase.backward) == ("layers.2", "dispatch", False)
    assert phase.by_rank[0].late == pytest.approx(0.050)
    assert phase.by_rank[0].transfer == pytest.approx(0.005)
    assert phase.by_rank[1].late == 0
    assert e.waited_for == pytest.approx([0.0, 0.025])
    assert e.total.exposed == pytest.approx((0.055 + 0.005) / 2)
    assert e.wait_share == pytest.approx(50 / 60)
    assert "rank 1" in e.sentence and "late" in e.sentence


def test_hidden_time_needs_a_record_of_computation() -> None:
    """It runs from 10 to 45 and is needed at 40. Nothing says what the rank computed in between."""
    one = step((100, [dispatch((10, 40, 45))]), (100, [dispatch((10, 30, 45))]))
    e = explain([one])
    assert e.total.exposed == pytest.approx(0.010)
    assert (e.total.hidden, e.hidden_share) == (None, None)
    assert e.sentence.startswith("Exposed all-to-all is 10% of the step of 100 ms.")
    assert "hidden" not in e.sentence
    assert "hidden_share" not in e.headline()
    seen = replace(one, ranks=tuple(replace(r, compute=((0.0, 0.02), (0.08, 0.1))) for r in one.ranks))
    assert explain([seen]).total.hidden == pytest.approx(0.010)
    assert "hidden behind computation" in explain([seen]).sentence


def test_the_rank_with_more_rows_makes_the_wait_uneven() -> None:
    """Rank 0 has 30 rows and computes 30 ms, rank 1 has 10 and computes 10: rank 1 waits 20 ms for experts."""
    mine = [dispatch((0, 0, 10), sent=(15, 5)), combine((40, 40, 45), sent=(15, 15))]
    theirs = [dispatch((0, 0, 10), sent=(15, 5)), combine((20, 20, 45), sent=(5, 5))]
    e = explain([step((50, mine), (50, theirs), load={"layers.2": [20.0, 10.0, 6.0, 4.0]})])
    back = next(phase for phase in e.phases if phase.part == "combine")
    assert back.by_rank[1].uneven == pytest.approx(0.020)
    assert back.by_rank[1].late == pytest.approx(0.0)
    assert back.by_rank[1].transfer == pytest.approx(0.005)
    (layer,) = e.layers
    assert layer.rank_imbalance == pytest.approx(1.5)
    assert (layer.busiest_rank, layer.busiest_expert) == (0, 0)
    assert layer.expert_imbalance == pytest.approx(2.0)
    assert (layer.seconds, layer.even_seconds) == (pytest.approx(0.045), pytest.approx(0.035))
    assert "the busiest expert 2 times (mostly expert 0)" in e.sentence


def test_imbalance_is_the_mean_over_steps_as_in_the_metrics() -> None:
    """Expert 0 has all tokens in one step, expert 1 in the next: their sum is even, each step is not."""
    ranks = [(50.0, [dispatch((0, 0, 10)), combine((20, 20, 25))])] * 2
    steps = [step(*ranks, load={"layers.2": load}) for load in ([8.0, 0.0], [0.0, 8.0])]
    assert explain(steps).layers[0].expert_imbalance == 2.0


def test_more_time_than_rows_explain_is_late_not_uneven() -> None:
    """Equal rows, but rank 0 was held up while its experts computed."""
    mine = [dispatch((0, 0, 10)), combine((40, 40, 45))]
    theirs = [dispatch((0, 0, 10)), combine((20, 20, 45))]
    back = next(phase for phase in explain([step((50, mine), (50, theirs))]).phases if phase.part == "combine")
    assert back.by_rank[1].uneven == 0
    assert back.by_rank[1].late == pytest.approx(0.020)


def test_in_backward_experts_compute_before_dispatch() -> None:
    def rank(computed: float, rows: int) -> list[CollectiveSpan]:
        there = combine((0, 0, 10), number=0, backward=True)
        back = dispatch((10 + computed, 10 + computed, 45), sent=(rows, rows), number=1, backward=True)
        return [there, back]

    phases = explain([step((50, rank(30, 15)), (50, rank(10, 5)))]).phases
    assert [(phase.part, phase.backward) for phase in phases] == [("combine", True), ("dispatch", True)]
    assert phases[1].by_rank[1].uneven == pytest.approx(0.020)


def test_a_stage_that_waits_for_its_neighbour_is_a_bubble() -> None:
    sent = collective("send", "pipeline", times=(30, 30, 31), bytes=8)
    received = collective("recv", "pipeline", times=(0, 5, 33), bytes=8)
    e = explain([step((50, [sent]), (50, [received]))])
    assert e.by_rank[1].bubble == pytest.approx(0.025)
    assert e.by_rank[1].others == {"pipeline": pytest.approx(0.003)}
    assert e.by_rank[0].bubble == 0


def test_waiting_in_what_all_ranks_share_is_idle() -> None:
    e = explain(
        [
            step(
                (50, [collective("all_reduce", "step", times=(20, 20, 41))]),
                (50, [collective("all_reduce", "step", times=(40, 40, 41))]),
            )
        ]
    )
    assert e.by_rank[0].idle == pytest.approx(0.021)
    assert e.by_rank[0].others == {}


def test_audited_waits_are_exact() -> None:
    """Rank 0 came at 10, rank 1 at 29. Their barrier ended at 30 and itself took 1; the bytes took 4."""
    e = explain(
        [step((50, [dispatch((10, 30, 34), met=0.030)]), (50, [dispatch((29, 30, 34), met=0.030)]), audit=True)]
    )
    assert [b.exposed for b in e.by_rank] == pytest.approx([0.019 + 0.004, 0.004])
    (phase,) = e.phases
    assert (phase.by_rank[0].late, phase.by_rank[0].transfer) == (pytest.approx(0.019), pytest.approx(0.004))
    assert (phase.by_rank[1].late, phase.by_rank[1].transfer) == (0.0, pytest.approx(0.004))
    assert e.audit
    assert phase.bandwidth == pytest.approx(10 / 0.004)


def test_bytes_between_and_inside_nodes() -> None:
    ranks = [(50.0, [dispatch((0, 0, 10), sent=(1, 2, 3, 4), ranks=(0, 1, 2, 3))]) for _ in range(4)]
    e = explain([step(*ranks, hosts=("a", "a", "b", "b"))])
    (phase,) = e.phases
    assert (phase.bytes_inter, phase.bytes_intra) == (2 * (3 + 4) + 2 * (1 + 2), 2 + 1 + 4 + 3)
    assert e.bytes == [[0, 2, 3, 4], [1, 0, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]]
    assert (phase.inside, phase.between) == (4, 2 * (3 + 4))
    assert phase.each == pytest.approx(0.010)


def test_a_gpu_trace_says_when_it_computed() -> None:
    """Compute 0 to 40 of 100, all-to-all 30 to 60: 10 hidden, 20 exposed, 40 idle."""
    one = step((100, [dispatch((30, 30, 60))]), (100, [dispatch((30, 30, 60))]))
    one = replace(one, ranks=tuple(replace(r, compute=((0.0, 0.04),)) for r in one.ranks))
    total = explain([one]).total
    assert total.parts == pytest.approx(
        {"compute": 0.04, "exposed all-to-all": 0.02, "pipeline bubble": 0.0, "idle": 0.04}
    )
    assert total.hidden == pytest.approx(0.01)


def test_time_for_ranks_that_were_not_recorded_is_unattributed() -> None:
    """Two of three ranks are recorded. Rank 4 waited 20 for rank 6, and an unknown time for rank 7."""
    group = {"ranks": (4, 6, 7), "sent": (1, 1, 1)}
    ranks = [(4, dispatch((10, 10, 60), **group)), (6, dispatch((30, 30, 60), **group))]
    e = explain([Step(1, tuple(RankStep(rank, "a", 0.0, 0.1, (t,)) for rank, t in ranks))])
    assert (e.ranks, e.waited_for) == ([4, 6], [0.0, pytest.approx(0.010)])
    assert (e.causes.late, e.causes.unattributed, e.causes.transfer) == (pytest.approx(0.010), pytest.approx(0.030), 0)
    assert "75% of the exposed time cannot be divided into waiting and moving bytes" in e.sentence
    assert "the traces of other ranks of its groups (7) are missing" in e.sentence
    assert "of the rest is waiting for rank 6, which arrives late" in e.sentence


def test_one_rank_alone_tells_nothing_of_waiting() -> None:
    e = explain([Step(1, (RankStep(3, "a", 0.0, 0.1, (dispatch((10, 10, 60), ranks=(0, 3)),)),))])
    assert e.wait_share is None
    assert e.causes.parts == {"transfer": 0, "late": 0, "uneven": 0, "unattributed": pytest.approx(0.050)}
    assert "waiting and moving bytes: this is the trace of one rank." in e.sentence
    assert "of the exposed time is moving bytes" not in e.sentence


def test_no_all_to_all_is_said() -> None:
    assert "No all-to-all" in explain([step((50, []), (50, []))]).sentence


def test_chunks_of_one_pass_are_one_pass() -> None:
    """The second chunk's rows leave before the first chunk's results return; those of the next pass leave later."""
    one = [dispatch((0, 2, 3)), dispatch((1, 5, 6)), combine((4, 8, 9)), combine((7, 9, 10))]
    found = passes([*one, dispatch((20, 21, 22)), combine((24, 25, 26))])
    assert [len(p) for p in found] == [4, 2]


def test_a_step_survives_its_file() -> None:
    one = step((50, [dispatch((10, 30, 34), met=0.030)]), (50, []), load={"layers.2": [1.0]})
    assert Step.from_json(one.to_json()) == one
    with_compute = replace(one, ranks=tuple(replace(r, compute=((0.0, 0.01),)) for r in one.ranks))
    assert Step.from_json(with_compute.to_json()) == with_compute


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


@settings(derandomize=True, deadline=None)
@given(SPANS, SPANS)
def test_intervals_are_sets_of_moments(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    def moments(spans: list[tuple[int, int]]) -> set[int]:
        return {t for begin, end in spans for t in range(begin, end)}

    x, y = union(a), union(b)
    assert moments(x) == moments(a)
    assert moments(common(x, y)) == moments(a) & moments(b)
    assert moments(without(x, y)) == moments(a) - moments(b)
    assert length(x) == len(moments(a))


TIMES = st.tuples(*[st.integers(-5, 105)] * 3).map(sorted)


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(TIMES, TIMES, st.sampled_from(PURPOSES)), max_size=12),
    st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=5)),
)
def test_the_parts_add_up_to_the_step(drawn: list, computed: list | None) -> None:
    """For any overlap, and for collectives that reach beyond the step."""
    ranks = [[collective("all_reduce", p, i, times[r]) for i, (*times, p) in enumerate(drawn)] for r in BOTH]
    one = step(*((100, collectives) for collectives in ranks))
    spans = None if computed is None else tuple((a / 1e3, b / 1e3) for a, b in computed)
    one = replace(one, ranks=tuple(replace(r, compute=spans) for r in one.ranks))
    taken = attributions(one)
    for r in one.ranks:
        parts = breakdown(r, taken[r.rank]).parts
        assert sum(parts.values()) == pytest.approx(0.1)
        assert min(parts.values()) > -1e-12
