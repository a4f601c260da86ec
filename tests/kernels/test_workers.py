"""Pieces of work on cores of their own: all are done, sums are in order, and nothing waits for ever."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from moesys.kernels.cpu import workers
from moesys.kernels.expert_ffn import expert_ffn
from moesys.kernels.permute import sort_by_expert


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("sizes", "threads", "shared"),
    [
        ([1] * 16, 2, 0),
        ([1] * 16, 4, 0),
        ([1] * 11, 2, 1),
        ([9, 1, 1, 1], 2, 2),
        ([9, 2, 2, 1, 1], 2, 1),
        ([3, 2, 1], 2, 0),
        ([1], 2, 1),
        ([1] * 16, 64, 16),
        ([5] + [1] * 250, 2, 0),
        ([], 2, 0),
    ],
)
def test_pieces_that_do_not_fill_the_threads_evenly_are_shared(sizes, threads, shared):
    assert workers.to_share(sizes, threads) == shared


def test_every_piece_is_done_and_finished_in_order_from_the_largest():
    sizes = [workers.LEAST * (1 + n % 3) for n in range(21)]
    done, names, both = [], set(), threading.Barrier(2)
    first = sorted(range(21), key=lambda n: -sizes[n])[:2]

    def work(piece: int):
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        if piece in first:  # two threads have one each
            both.wait(600)
        return lambda: done.append(piece)

    workers.each(range(21), sizes, work)
    assert done == sorted(range(21), key=lambda n: -sizes[n])
    assert len(names) > 1 and threading.main_thread().name not in names
    assert torch.get_num_threads() == 3


def test_small_pieces_stay_where_they_are():
    def work(piece: int):
        assert threading.current_thread() is threading.main_thread()
        return lambda: done.append(piece)

    done: list[int] = []
    workers.each("abc", [1, 3, 2], work)
    assert done == ["b", "c", "a"]


def test_what_one_piece_raises_is_raised():
    def work(piece: int):
        if piece == 4:
            raise ValueError("piece 4")
        return lambda: None

    for _ in range(2):
        with pytest.raises(ValueError, match="piece 4"):
            workers.each(range(9), [workers.LEAST] * 9, work)


def _layer(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    token, expert = torch.arange(300).repeat_interleave(2), torch.randint(0, 6, (600,))
    p = sort_by_expert(token, expert, 300, 6)
    x, fc1, fc2 = torch.randn(300, 64), torch.randn(6, 64, 2, 512), torch.randn(6, 512, 64)
    given = [t.to(dtype).requires_grad_() for t in (x, fc1, fc2)]
    return given, lambda x, fc1, fc2: expert_ffn(x, fc1, fc2, p.counts_E, "swiglu", torch.rand(600), None, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bits_every_time(monkeypatch, dtype):
    monkeypatch.setattr(workers, "LEAST", 0)
    monkeypatch.setattr(workers, "UNEVEN", float("inf"))
    given, layer = _layer(dtype)
    found = []
    for _ in range(6):
        torch.manual_seed(1)
        out = layer(*given)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), given)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_needs_no_gradients(monkeypatch, mode):
    given, layer = _layer()
    torch.manual_seed(1)
    expected = layer(*given).detach()
    monkeypatch.setattr(workers, "LEAST", 0)
    monkeypatch.setattr(workers, "UNEVEN", float("inf"))
    torch.manual_seed(1)
    with mode():
        torch.testing.assert_close(layer(*given), expected)


def _in_a_child() -> None:
    done: list[int] = []
    torch.set_num_threads(3)
    workers.each(range(6), [workers.LEAST] * 6, lambda n: lambda: done.append(n))
    assert done == list(range(6))


def test_a_fork_starts_threads_of_its_own():
    _in_a_child()
    child = multiprocessing.get_context("fork").Process(target=_in_a_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0
