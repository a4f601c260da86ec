"""What the loop around all launchers adds: the placement of a started run, the choice of launcher."""

from __future__ import annotations

import pytest

from moesys.errors import LaunchError
from moesys.launchers.launch import launch, misplaced, workers
from moesys.launchers.spec import RunSpec


def spec(config, tmp_path, **parallel: int) -> RunSpec:
    cluster = {"nodes": 2, "ranks_per_node": 2}
    return RunSpec.of(config(cluster=cluster, parallel=parallel), tmp_path)


def ranks(*hosts: str) -> dict[int, dict[str, object]]:
    return {rank: {"host": host, "pid": rank} for rank, host in enumerate(hosts)}


def test_ranks_where_they_belong_are_not_mentioned(config, tmp_path):
    assert misplaced(spec(config, tmp_path, tp=2), ranks("a", "a", "b", "b")) == []


def test_a_scheduler_that_scattered_the_ranks_is_told_on(config, tmp_path):
    (warning,) = misplaced(spec(config, tmp_path, tp=2), ranks("a", "b", "a", "b"))
    assert warning.startswith("warning: 2 of 2 tensor groups of tp(2) cross nodes")
    (note,) = misplaced(spec(config, tmp_path, ep=2), ranks("a", "b", "a", "b"))
    assert note.startswith("note: 2 of 2 expert groups of ep(2)")


def test_what_the_plan_knew_is_repeated_only_as_a_warning(config, tmp_path):
    assert misplaced(spec(config, tmp_path, ep=4), ranks("a", "a", "b", "b")) == []
    (warning,) = misplaced(spec(config, tmp_path, tp=4), ranks("a", "a", "b", "b"))
    assert warning.startswith("warning: 1 of 1 tensor groups of tp(4)")


def test_an_incomplete_map_is_not_judged(config, tmp_path):
    assert misplaced(spec(config, tmp_path, tp=2), ranks("a", "b")) == []


def test_an_unknown_launcher_is_refused(config, tmp_path):
    with pytest.raises(LaunchError, match="there is no launcher 'mpi': use ray, local, hosts or slurm"):
        launch(spec(config, tmp_path), "mpi")


def test_what_only_submits_has_no_workers_to_wait_for(config, tmp_path):
    with pytest.raises(LaunchError, match="launcher slurm submits runs alone"):
        workers(RunSpec.of(config(), tmp_path), "slurm")
