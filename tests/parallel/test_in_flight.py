"""The passes of a pipeline's ranks, beside those of torch's schedules, and what is held meanwhile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from moesys.parallel.in_flight import Action, StageBytes, actions, fullest

NAMES = {"FORWARD": "forward", "FULL_BACKWARD": "backward", "BACKWARD_INPUT": "inputs", "BACKWARD_WEIGHT": "weights"}
SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL = {"interleaved-1f1b": ScheduleInterleaved1F1B, "zero-bubble": ScheduleInterleavedZeroBubble}


def of_torch(schedule: str, pp: int, virtual: int, count: int, rank: int) -> list[Action]:
    """The passes of one rank, without a pipeline: torch makes orders of a few numbers."""
    if schedule in SINGLE:
        one = SimpleNamespace(_num_stages=pp, _n_microbatches=count)
        order = SINGLE[schedule]._get_pipeline_order(one)[rank]
    else:
        rounds = max(1, count // pp)
        several = SimpleNamespace(
            n_local_stages=virtual,
            pp_group_size=pp,
            _n_microbatches=count,
            rank=rank,
            microbatches_per_round=count // rounds,
        )
        order = SEVERAL[schedule]._calculate_single_rank_operations(several, rank)
    every = [(action.computation_type.name, action.stage_index) for action in order if action is not None]
    return [(NAMES[kind], stage // pp) for kind, stage in every if kind in NAMES]


@pytest.mark.parametrize("schedule", [*SINGLE, *SEVERAL])
def test_ranks_run_stages_in_the_order_of_torch(schedule):
    for pp in (2, 3, 4):
        for virtual in (1, 2, 3) if schedule in SEVERAL else (1,):
            for count in (pp, 2 * pp, 4 * pp):
                for rank in range(pp):
                    layout = pp, virtual, count, rank
                    assert list(actions(schedule, *layout)) == of_torch(schedule, *layout), layout


@pytest.mark.parametrize(
    ("schedule", "rank", "expected"),
    [
        ("gpipe", 0, 12),
        ("1f1b", 0, 4),
        ("1f1b", 3, 1),
        ("interleaved-1f1b", 0, 11),  # 2 · (pp − r − 1) + (pp_virtual − 1) · pp + 1
        ("interleaved-1f1b", 3, 5),
        ("zero-bubble", 0, 8),  # pp_virtual · pp
        ("zero-bubble", 3, 8),
    ],
)
def test_as_many_micro_batches_are_in_flight_as_the_guide_says(schedule, rank, expected):
    virtual = 2 if schedule in SEVERAL else 1
    order = actions(schedule, 4, virtual, 12, rank)
    assert fullest(order, [StageBytes(1.0)] * virtual) == expected


def test_gradients_are_held_between_both_parts_of_a_backward_pass_and_what_is_sent_to_the_end():
    stage = StageBytes(kept=10.0, gradients=4.0, sent=1.0)
    order = list(actions("zero-bubble", 1, 1, 2, 0))
    assert order == [("forward", 0), ("inputs", 0), ("weights", 0)] * 2
    assert fullest(order, [stage]) == 10 + 4 + 1
    assert fullest(actions("1f1b", 1, 1, 3, 0), [StageBytes(10.0, sent=1.0)]) == 10 + 2
