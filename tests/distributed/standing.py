"""Connected worker processes that stay, so that many questions cost one start."""

from __future__ import annotations

import io
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ANSWER_S = 600.0
"""After which ranks count as hung."""


class RankError(AssertionError):
    """A rank failed, or did not answer."""


class Standing:
    """`world` processes, connected by gloo, from the first question on.

    After a failure of any rank all are ended, and the next question starts others: what one question
    leaves behind does not answer the next.
    """

    def __init__(self, world: int):
        self.world = world
        self._ends: list[Connection] = []
        self._processes: Any = None

    def ask(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(rank, *arguments)` returns in each process, all at once.

        Raises:
            RankError: the text of the first exception.
        """
        if self._processes is None:
            self._start()
        for end in self._ends:
            end.send((work, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            open_ends = [end for rank, end in enumerate(self._ends) if rank not in answers]
            ready = wait(open_ends, timeout=ANSWER_S)
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                answers[rank] = self._received(rank)
            if not ready:
                self._fail(f"ranks {sorted(set(range(self.world)) - set(answers))} do not answer")
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            for end in self._ends:
                end.send(None)
            while not self._processes.join():
                pass
            self._processes = None

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        self._ends, theirs = map(list, zip(*(context.Pipe() for _ in range(self.world)), strict=True))
        self._folder = tempfile.TemporaryDirectory()
        arguments = (self.world, f"file://{self._folder.name}/rendezvous", theirs)
        self._processes = mp.start_processes(_serve, arguments, self.world, join=False, start_method="forkserver")
        for end in theirs:
            end.close()  # the processes' own, so that a dead one is known by the end of what it sends

    def _received(self, rank: int) -> Any:
        try:
            failed, packed = self._ends[rank].recv()
        except (EOFError, ConnectionResetError):
            self._fail(f"rank {rank} died")
        if failed:
            self._fail(f"rank {rank}: {packed}")
        return torch.load(io.BytesIO(packed), weights_only=False)

    def _fail(self, text: str) -> None:
        for process in self._processes.processes:
            process.kill()
            process.join()
        self._processes = None
        raise RankError(text)


def _serve(rank: int, world: int, store: str, ends: list[Connection]) -> None:
    for other, end in enumerate(ends):
        if other != rank:
            end.close()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=ANSWER_S))
    while (question := ends[rank].recv()) is not None:
        ends[rank].send(_answer(rank, *question))
    dist.barrier()
    dist.destroy_process_group()


def _answer(rank: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether it failed, and the text of the exception or what was returned."""
    packed = io.BytesIO()
    try:
        torch.save(work(rank, *arguments), packed)
    except Exception:
        return True, traceback.format_exc()
    return False, packed.getvalue()
