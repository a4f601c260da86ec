"""Steps whose numbers stay on the device: nobody waits for them, and what is read later is what was true then."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ran import waits_counted
from support import changed

from moesys.config import Config
from moesys.data.corpus import open_corpus
from moesys.errors import TrainingError
from moesys.parallel import comm
from moesys.parallel.gradients import local
from moesys.train import backlog
from moesys.train.engine import engine_of
from moesys.train.loop import Trainer

TIMES = ("all_to_all_share", "tokens_per_second", "step_seconds")
TARGET = "layers.1.ffn.experts.fc1"


@pytest.fixture(scope="module")
def trainer(small: dict) -> Iterator[Callable[..., Trainer]]:
    """Makes trainers on one process, of a model with gates that follow the global batch."""
    moe = {"bias_rate": 0.01, "global_balance_loss": 0.02}
    base = changed(small, {"model": {"hidden": 16, "layers": 2, "moe": moe}, "train": {"seq_len": 8, "steps": 40}})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def make(*changes: dict) -> Trainer:
        config = Config.model_validate(changed(base, *changes))
        return Trainer(config, engine_of(config).connect(config), open_corpus(config))

    yield make
    dist.destroy_process_group()


def poison(run: Trainer, bad: set[int]) -> None:
    """Make an element of a gradient infinite in the steps `bad`."""

    def spoil() -> None:
        if run.step in bad:
            local(run.engine.model.named_parameters()[TARGET].grad).view(-1)[0] = inf

    run.before_update = spoil


def state(run: Trainer) -> dict[str, torch.Tensor]:
    """Weights, what gates keep, and what the optimizer keeps."""
    kept = run.engine._state()
    return {name: local(value).clone() for part in kept.values() for name, value in part.items()}


def same(a: Trainer, b: Trainer) -> bool:
    ours, theirs = state(a), state(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


PADDED = {"model": {"moe": {"capacity_factor": 1.0, "pad_to_capacity": True}}}


@pytest.mark.parametrize("change", [{}, PADDED, {"train": {"recompute": "full"}}])
def test_the_host_waits_for_no_step_that_is_not_due(trainer, change):
    run = trainer(change)
    run.train_step()
    for _ in range(2):
        with waits_counted() as waits, comm.record() as events:
            assert run.train_step(due=False) == {}
        assert not waits
        assert sum(event.tag == comm.STEP for event in events) == 1, "the norm alone is shared"
    with waits_counted() as waits, comm.record() as events:
        assert run.train_step()["step"] == 4
    assert waits == {"moesys/train/backlog.py": 2}, "one copy to the host, seen as an array"
    assert sum(event.tag == comm.STEP for event in events) == 2


def test_nothing_is_recorded_in_a_step_that_is_not_due(trainer, monkeypatch):
    """So that no event of a GPU is made for it."""
    run, seen = trainer(), []
    train = run.engine.train
    monkeypatch.setattr(run.engine, "train", lambda *given: (seen.append(comm.recording()), train(*given))[1])
    for due in (False, True, False):
        run.train_step(due=due)
    assert seen == [False, True, False]


def test_a_wait_inside_a_step_is_counted(trainer):
    run = trainer()
    for spoil in (lambda: run.engine._loss.item(), lambda: run.engine._loss.isfinite().nonzero()):
        run.before_update = spoil
        with waits_counted() as waits:
            run.train_step(due=False)
        assert waits.total() == 1


def test_what_is_read_later_is_what_was_read_at_once(trainer):
    often, seldom = trainer(), trainer()
    records = [often.train_step() for _ in range(6)]
    found = [seldom.train_step(due=step in (4, 6)) for step in range(1, 7)]
    assert [bool(record) for record in found] == [False, False, False, True, False, True]
    assert [report.measured.step for report in seldom.reports] == [5, 6]
    for step in (3, 5):
        ours, theirs = ({k: v for k, v in r[step].items() if k not in TIMES} for r in (found, records))
        assert ours == theirs
    assert seldom.balance.as_json() == often.balance.as_json() and seldom.load == often.load
    assert same(seldom, often)


def test_the_device_skips_what_is_not_finite_and_the_host_hears_of_it_later(trainer):
    run, without = trainer({"train": {"skips": {"consecutive": 1}}}), trainer()
    poison(run, {2, 3})
    for step in range(1, 6):
        run.train_step(due=step == 5)
        if step in (2, 3):
            without.step, without.seen = without.step + 1, without.seen + run.config.train.global_batch
        else:
            without.train_step()
    assert same(run, without)
    assert [report.skip is not None for report in run.reports] == [False, True, True, False, False]
    assert {str(report.skip.gradients) for report in run.reports[1:3]} == {f"['{TARGET}']"}
    assert (run.guard.consecutive, run.guard.total) == (0, 2)
    with pytest.raises(TrainingError, match="step 3: skipped because it is not finite, 2 in a row") as error:
        run.guard.check()
    assert f"norm of the gradients inf, first in the gradient of {TARGET}" in str(error.value)


def test_a_first_step_that_is_skipped_leaves_an_optimizer_that_was_not_used(trainer):
    run = trainer()
    poison(run, {1})
    run.train_step(due=False)
    assert same(run, trainer())


def test_a_checkpoint_knows_of_all_steps(trainer, tmp_path):
    run = trainer()
    poison(run, {2})
    for _ in range(2):
        run.train_step(due=False)
    run.save(tmp_path)
    again = trainer()
    again.resume(tmp_path)
    assert (again.guard.consecutive, again.guard.total) == (1, 1)


def test_no_step_waits_for_ever(trainer, monkeypatch):
    monkeypatch.setattr(backlog, "MOST", 3)
    run = trainer()
    records = [run.train_step(due=False) for _ in range(7)]
    assert [bool(record) for record in records] == [False, False, True, False, False, True, False]
    assert {record["all_to_all_share"] for record in records if record} == {None}, "rows were not timed"


def census() -> Counter[str]:
    """Living objects of ours and of torch by type; unfinished collectives."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind: type[Any] = type(thing)
        module = str(kind.__module__)
        if module.startswith(("moesys.", "torch")):
            found[f"{module}.{kind.__qualname__}"] += 1
        elif kind in (list, dict, set):
            # Of any that grows from step to step.
            found[f"elements of {kind.__name__}s"] += len(thing)
    found["collectives"] = torch._C._distributed_c10d._get_work_registry_size()
    return found


@pytest.mark.parametrize("every", [1, 5])
def test_nothing_grows_with_the_steps(trainer, every):
    run = trainer()
    for step in range(10):
        run.train_step(due=step % every == every - 1)
    before = census()
    for step in range(20):
        run.train_step(due=step % every == every - 1)
    grown = census() - before
    assert not {kind: more for kind, more in grown.items() if more >= (20 if "elements" in kind else 5)}
