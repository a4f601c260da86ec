"""Telling the first failure from those that follow from it, by what each is."""

from __future__ import annotations

import errno
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moesys.errors import DataError, LaunchError, MoesysError
from moesys.launchers import outcome
from moesys.train.failure import Failure, FailureKind, exit_code_of, kind_of

GLOO = "[../third_party/gloo/gloo/transport/tcp/"
FULL = OSError(errno.ENOSPC, "No space left on device")

KINDS = [
    (RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:59862"), FailureKind.LOST),
    (
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Read error [10.0.0.1]:4711: Connection reset by peer"),
        FailureKind.LOST,
    ),
    (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), FailureKind.LOST),
    (dist.DistNetworkError("failed to recv, got 0 bytes"), FailureKind.LOST),
    (
        RuntimeError(f"{GLOO}unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation to complete"),
        FailureKind.TIMEOUT,
    ),
    (dist.DistStoreError("Timed out after 21 seconds waiting for clients. 1/2 clients joined."), FailureKind.TIMEOUT),
    (dist.DistStoreError("wait timeout after 20000ms, keys: /default_pg/0//cpu//0"), FailureKind.TIMEOUT),
    (
        dist.DistNetworkError("The server socket has failed to listen: EADDRINUSE: address already in use"),
        FailureKind.PORT,
    ),
    (MoesysError("measure.metrics_port: 127.0.0.1:9000: address already in use"), FailureKind.USER),
    (OSError(errno.EADDRINUSE, "Address already in use"), FailureKind.BUG),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), FailureKind.BUG),
    (TimeoutError("timed out"), FailureKind.BUG),
    (DataError("the server said: connection refused"), FailureKind.USER),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), FailureKind.MEMORY),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        FailureKind.MEMORY,
    ),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), FailureKind.BUG),
    (PermissionError(errno.EACCES, "Permission denied", "/data/x"), FailureKind.FILE),
    (OSError(errno.EROFS, "Read-only file system", "/data/x"), FailureKind.FILE),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x"), FailureKind.BUG),
    (FULL, FailureKind.DISK),
    (CheckpointException("save", {1: (FULL, None)}), FailureKind.DISK),
    (ValueError("3"), FailureKind.BUG),
]


@pytest.mark.parametrize(("error", "kind"), KINDS, ids=lambda value: str(value)[:40])
def test_a_failure_is_told_by_what_it_is(error, kind):
    assert kind_of(error) is kind


def test_what_an_error_came_from_counts(tmp_path):
    try:
        try:
            raise FULL
        except OSError as error:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0") from error
    except RuntimeError as error:
        told = Failure.of(error, 1, tmp_path)
    assert told.kind is FailureKind.DISK and told.sentence.startswith("no space left on the disk of ")


def test_of_many_failures_the_cause_is_told():
    kinds = [
        FailureKind.LOST,
        FailureKind.TIMEOUT,
        FailureKind.EXIT,
        FailureKind.BUG,
        FailureKind.USER,
        FailureKind.CRASH,
    ]
    failures = [Failure(rank, kind, "", at=rank) for rank, kind in enumerate(kinds)]
    assert outcome.first_cause(failures).kind is FailureKind.CRASH
    assert outcome.first_cause(failures[:5]).kind is FailureKind.BUG  # of equal ones, the earliest
    assert outcome.first_cause(failures[:3]).kind is FailureKind.EXIT
    assert outcome.first_cause(failures[:2]).kind is FailureKind.TIMEOUT


def test_users_errors_are_told_without_traceback_and_bugs_with(tmp_path):
    told = Failure.of(DataError("no text in corpus/"), 0, tmp_path)
    assert told.text == "no text in corpus/" and told.exit_code == 2
    try:
        raise KeyError("x")
    except KeyError as error:
        bug = Failure.of(error, 1, tmp_path)
    assert bug.text.startswith("KeyError: 'x'\nTraceback") and bug.text.endswith("KeyError: 'x'")
    assert Failure.parse(bug.json) == bug
    bug.write(tmp_path)
    assert (tmp_path / "errors" / "rank-1.txt").read_text() == bug.text + "\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError(""), 2), (LaunchError(""), 1), (KeyError(""), 1), (SystemExit(5), 5), (SystemExit("text"), 1)],
)
def test_exit_codes(error, code):
    assert exit_code_of(error) == code


def test_a_worker_is_named_as_far_as_it_is_known(tmp_path):
    assert outcome.name(1, tmp_path) == "rank 1"
    assert outcome.name(1, tmp_path, pid=7) == "rank 1 (pid 7)"
    (tmp_path / "ranks.json").write_text(json.dumps([{}, {"pid": 4711, "host": "gpu-03"}]))
    assert outcome.name(1, tmp_path, pid=7) == "rank 1 (pid 4711, node gpu-03)"
    (tmp_path / "ranks.json").write_text(json.dumps({"1": {"pid": 4712, "host": "gpu-04"}}))
    assert outcome.name(1, tmp_path) == "rank 1 (pid 4712, node gpu-04)"


def test_traces_of_an_earlier_attempt_are_cleared(tmp_path):
    Failure.of(DataError("old"), 0, tmp_path).write(tmp_path)
    (tmp_path / "beats").mkdir()
    (tmp_path / "ranks.json").write_text("[]")
    outcome.clear_traces(tmp_path)
    assert not list(tmp_path.glob("*/*")) and not (tmp_path / "beats").exists() and outcome.read_ranks(tmp_path) == {}


def test_a_log_is_read_from_its_last_attempt_on(tmp_path):
    (tmp_path / "logs").mkdir()
    log = outcome.log_file(tmp_path, 0)
    log.write_text("=== attempt 1, then: x\nold\n=== attempt 2, now: x\nnew\n")
    assert outcome.log_text(tmp_path, 0) == "new\n"
    assert outcome.log_tail(tmp_path, 0) == f"the last lines of {log}:\n  new"
