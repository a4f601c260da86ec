"""What is found before any worker starts, and told once."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import yaml
from support import changed

from moesys import cli
from moesys.errors import FileError, LaunchError
from moesys.launchers import folder, inherited_env, preflight
from moesys.launchers.command import command_line, going_on
from moesys.launchers.lock import locked
from moesys.train import validate
from moesys.train.worker import going_on as resumed


@pytest.fixture
def launch(small: dict, tmp_path: Path, capsys):
    """`launch({section: {key: value}})` launches a run called "run": its exit code and standard error."""

    def run(*changes: dict) -> tuple[int, str]:
        path = tmp_path / "run.yaml"
        here = {"output": {"runs": str(tmp_path)}, "launch": {"launcher": "local"}, "cluster": {"ranks_per_node": 2}}
        path.write_text(yaml.safe_dump(changed(small, here, *changes)))
        code = cli.main(["launch", str(path)])
        return code, capsys.readouterr().err

    return run


def test_text_that_cannot_be_used_is_told_before_workers_start(launch, tmp_path):
    lines = [json.dumps({"text": "word " * 100})] * 16 + [json.dumps({"body": "no text"})]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    code, err = launch({"data": {"path": str(tmp_path / "some.jsonl")}})
    assert code == 2
    assert err.splitlines() == [
        f'moesys launch: {tmp_path}/some.jsonl:17: has no field "text" (data.text_key), but body'
    ]
    assert not (tmp_path / "run" / "logs").exists()


def test_a_taken_metrics_port_is_told_before_workers_start(launch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, err = launch({"measure": {"metrics_port": port}})
    assert code == 1
    rule = f"moesys launch: measure.metrics_port: 127.0.0.1:{port}: address already in use"
    assert err.splitlines()[0] == rule and "remedy: choose another port" in err
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize("name", ["errors", "logs", "checkpoints", "beats"])
def test_a_file_where_a_folder_must_be_is_told(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(
        FileError, match=f"{name} is a file, and a folder of this name is to be written\n    remedy: move it away"
    ):
        folder.make(tmp_path)


@pytest.mark.parametrize("name", ["launch.lock", "config.yaml", "metrics.jsonl"])
def test_a_folder_where_a_file_must_be_is_told(name, tmp_path):
    (tmp_path / name).mkdir()
    with (
        pytest.raises(FileError, match=f"{name} is a folder, and a file of this name is to be written"),
        locked(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(FileError, match=r"runs is a file, and a folder of this name is to be written"):
        folder.make(tmp_path / "runs" / "name")


def test_a_missing_package_is_told_before_workers_start(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "output.tensorboard: needs the package tensorboard" in "".join(map(str, validate.output(config())))
    with pytest.raises(LaunchError, match=r"measure\.metrics_port: needs the package prometheus_client"):
        preflight.port(config(measure={"metrics_port": 9000}), "ray")


def test_variables_of_other_launchers_are_dropped(monkeypatch):
    theirs = (
        "TORCHELASTIC_RUN_ID",
        "GROUP_RANK",
        "ROLE_WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
    )
    ours = ("TORCH_LOGS", "OMP_NUM_THREADS", "SLURM_JOB_ID", "MOESYS_NODE_IP", "NCCL_DEBUG")
    assert inherited_env.cleaned(dict.fromkeys((*theirs, *ours), "1")).keys() == set(ours)
    for name in theirs:
        monkeypatch.setenv(name, "1")
    assert cli.main(["config", "--schema"]) == 0
    assert not os.environ.keys() & set(theirs)


def test_a_run_that_ended_early_says_how_it_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/moesys", "launch", "a b.yaml", "launch.env={TOKEN: x}", "train.steps=9"])
    command = "moesys launch 'a b.yaml' 'launch.env=…' train.steps=9"
    assert command_line() == command
    told = going_on(tmp_path, 4, config(train={"steps": 9}))
    assert told.startswith("the run got to step 4 of 9; no checkpoint was saved yet: set output.checkpoint_every")
    assert told.endswith(f"\n    to start again: {command}")
    for name in ("step-00000002", "step-00000010", "step-00000011", "step-best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step-00000011":
            (tmp_path / "checkpoints" / name / "moesys.json").touch()
    told = going_on(tmp_path, 14, config(train={"steps": 20}))
    assert told == (
        f"the run got to step 14 of 20; its newest checkpoint is {tmp_path}/checkpoints/step-00000010"
        f"\n    to go on: {command}"
    )


def test_a_resumed_run_says_from_where_it_goes_on(tmp_path):
    where = Path("checkpoints/step-00000010")
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n{"step": 10}\n')
    assert resumed(where, 10, 20, tmp_path) == f"going on from step 10 of 20: {where}"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13}\n{"st')
    assert resumed(where, 10, 20, tmp_path).endswith("; metrics of steps 11 to 13 are removed and written again")
    assert resumed(where, 20, 20, tmp_path) == f"nothing is left to train: {where} is of step 20 of 20"
