"""Memory of large results is used again, and never while anything still looks at it."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moesys.kernels.cpu import memory_pool
from moesys.kernels.cpu.memory_pool import SMALLEST, Pool
from moesys.kernels.expert_ffn import expert_ffn
from moesys.measure.peak_memory import peak_bytes

FLOATS = SMALLEST // 4


def test_memory_comes_back_when_the_last_view_of_it_is_gone():
    pool = Pool()
    x = pool.empty((FLOATS,), torch.float32).zero_()
    where, view = x.data_ptr(), x.view(2, -1)[1]
    del x
    other = pool.empty((FLOATS,), torch.float32).fill_(1)
    assert other.data_ptr() != where and not view.any(), "half of it is still looked at"
    del view
    assert pool.empty((2, FLOATS // 2), torch.float32).data_ptr() == where
    assert pool.empty((2 * FLOATS,), torch.bfloat16).data_ptr() == where, "of any shape and type"


def test_a_size_that_differs_little_shares_a_block():
    pool = Pool()
    where = pool.empty((FLOATS * 2 - 1000,), torch.float32).data_ptr()
    x = pool.empty((FLOATS * 2 - 10,), torch.float32)
    assert x.data_ptr() == where
    x.fill_(1)
    assert x.sum().item() == len(x)


@pytest.mark.parametrize("sizes", [[1, 8, 1, 8], [8, 1, 4, 2], [3, 5, 7, 11, 2]])
def test_no_more_is_held_than_was_lent_at_once(sizes):
    pool, most = Pool(), 0
    for size in sizes:
        for count in (1, 2):
            lent = [pool.empty((FLOATS * size,), torch.float32) for _ in range(count)]
            most = max(most, sum(x.nbytes for x in lent))
            assert pool.held <= pool.peak <= most * 9 / 8
            del lent


def test_small_results_are_left_to_torch():
    pool = Pool()
    pool.empty((FLOATS - 1,), torch.float32)
    assert pool.lent == 0


def test_memory_that_another_process_may_look_at_is_not_lent_again():
    pool = Pool()
    x = pool.empty((FLOATS,), torch.float32).fill_(1)
    seen = x.share_memory_().untyped_storage()
    where = seen.data_ptr()
    del x, seen
    y = pool.empty((FLOATS,), torch.float32)
    assert y.data_ptr() != where
    assert pool.held == pool.lent == SMALLEST


def test_threads_share_it():
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for turn in range(50):
            x = pool.empty((FLOATS,), torch.float32).fill_(number * 100 + turn)
            y = x.view(4, -1)[number % 4]
            del x
            if (y != number * 100 + turn).any():
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.peak <= 8 * SMALLEST, "of each thread the last and the next"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_finds_the_pool_in_order(monkeypatch):
    """Whatever another thread does with it at that moment."""
    pool, inside, forked = memory_pool._POOL, threading.Event(), threading.Event()

    def slow(size: int) -> torch.UntypedStorage:
        inside.set()
        forked.wait(0.5)
        return torch.UntypedStorage(size)

    monkeypatch.setattr(pool, "_take", slow)
    thread = threading.Thread(target=memory_pool.empty, args=((FLOATS,), torch.float32))
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        signal.alarm(600)  # where the lock is never free
        pool._lock.acquire()
        os._exit(0)
    forked.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def _layer(rows: int):
    torch.manual_seed(rows)
    x = torch.randn(rows, 128, requires_grad=True)
    fc1 = torch.randn(4, 128, 2, 512, requires_grad=True)
    fc2 = torch.randn(4, 512, 128, requires_grad=True)
    return x, fc1, fc2, torch.full((4,), rows // 4)


def test_gradients_outlive_the_steps_after_them():
    given = _layer(2048)
    kept = torch.autograd.grad(expert_ffn(*given).sum(), given[:3])
    copies = [g.clone() for g in kept]
    for rows in (2048, 1024, 2048):
        other = _layer(rows)
        torch.autograd.grad(expert_ffn(*other).square().sum(), other[:3])
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_a_graph_can_be_walked_twice_beside_another_step():
    given = _layer(2048)
    loss = expert_ffn(*given).square().sum()
    first = torch.autograd.grad(loss, given[:3], retain_graph=True)
    other = _layer(1024)
    torch.autograd.grad(expert_ffn(*other).sum(), other[:3])
    for a, b in zip(first, torch.autograd.grad(loss, given[:3]), strict=True):
        assert torch.equal(a, b)


def test_peak_memory_counts_what_every_thread_holds():
    def hold(turn: int) -> None:
        x = memory_pool.empty((2 * FLOATS,), torch.float32)
        all_hold.wait()
        del x

    def step() -> None:
        x, plain = memory_pool.empty((4 * FLOATS,), torch.float32), torch.empty(3 * FLOATS)
        y = memory_pool.empty((FLOATS,), torch.float32)
        del y, plain
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(hold, range(2)))
        del x

    all_hold = threading.Barrier(2)
    step()
    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(peak_bytes, step, torch.device("cpu")).result() == 8 * SMALLEST
    kept = memory_pool.empty((FLOATS,), torch.float32)
    assert peak_bytes(lambda: kept.zero_(), torch.device("cpu")) == 0, "what was there before does not count"
