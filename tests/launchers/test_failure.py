"""Telling the first error from those that follow from it."""

from __future__ import annotations

import json
import os

import pytest

from moesys.errors import DataError, LaunchError
from moesys.launchers import failure

LOST_PEER = [
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:59862",
    "RuntimeError: [gloo/transport/tcp/pair.cc:534] Read error [10.0.0.1]:4711: Connection reset by peer",
    "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error",
    "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
]


@pytest.mark.parametrize("text", LOST_PEER)
def test_the_loss_of_a_peer_is_a_consequence(text):
    assert failure.WorkerError(0, text, 0).is_consequence


@pytest.mark.parametrize("text", ["ValueError: 3", "the corpus is empty", "torch.OutOfMemoryError: CUDA out of memory"])
def test_other_errors_are_causes(text):
    assert not failure.WorkerError(0, text, 0).is_consequence


def test_errors_are_read_in_the_order_of_their_writing(tmp_path):
    for rank, text in ((10, "late"), (2, LOST_PEER[0]), (3, "early")):
        failure.record(tmp_path, rank, DataError(text))
    for rank, when in ((10, 3), (2, 1), (3, 2)):
        os.utime(failure.error_file(tmp_path, rank), ns=(when, when))
    errors = failure.read_errors(tmp_path)
    assert [error.rank for error in errors] == [2, 3, 10]
    assert failure.first_cause(errors).text == "early"
    assert failure.first_cause(errors[:1]).rank == 2
    assert failure.first_cause([]) is None


def test_users_errors_are_recorded_without_traceback_and_bugs_with(tmp_path):
    assert failure.record(tmp_path, 0, DataError("no text in corpus/")) == "no text in corpus/"
    try:
        raise KeyError("x")
    except KeyError as error:
        text = failure.record(tmp_path, 1, error)
    assert text.startswith("Traceback") and text.endswith("KeyError: 'x'")


def test_what_the_worker_wrote_itself_is_kept(tmp_path):
    failure.record(tmp_path, 0, DataError("its own"))
    assert failure.record(tmp_path, 0, KeyError("later")) == "its own"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError(""), 2), (LaunchError(""), 1), (KeyError(""), 1), (SystemExit(5), 5), (SystemExit("text"), 1)],
)
def test_exit_codes(error, code):
    assert failure.exit_code_of(error) == code


def test_a_worker_is_named_as_far_as_it_is_known(tmp_path):
    assert failure.name(1, tmp_path) == "rank 1"
    assert failure.name(1, tmp_path, pid=7) == "rank 1 (pid 7)"
    (tmp_path / "ranks.json").write_text(json.dumps([{}, {"pid": 4711, "host": "gpu-03"}]))
    assert failure.name(1, tmp_path, pid=7) == "rank 1 (pid 4711, node gpu-03)"
    (tmp_path / "ranks.json").write_text(json.dumps({"1": {"pid": 4712, "host": "gpu-04"}}))
    assert failure.name(1, tmp_path) == "rank 1 (pid 4712, node gpu-04)"


def test_traces_of_an_earlier_attempt_are_cleared(tmp_path):
    failure.record(tmp_path, 0, DataError("old"))
    (tmp_path / "ranks.json").write_text("[]")
    failure.clear_traces(tmp_path)
    assert failure.read_errors(tmp_path) == [] and failure.read_ranks(tmp_path) == {}
