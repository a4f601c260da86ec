"""The batch script: its text, its syntax, and what it does under a stand-in for srun."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from moesys.config.load import load
from moesys.errors import LaunchError
from moesys.launchers import slurm
from moesys.launchers.lock import locked
from moesys.launchers.spec import RunSpec

SRUN = """#!/bin/bash
# Starts $RANKS tasks here, two to a "node", as srun would; ends with the highest exit code.
while [[ "$1" == --* ]]; do [[ "$1" == --output=* ]] && output="${1#--output=}"; shift; done
for ((rank = 0; rank < RANKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) SLURM_NTASKS=$RANKS "$@" >> "${output/\\%t/$rank}" 2>&1 &
done
code=0; for job in $(jobs -p); do wait "$job" || code=$?; done; exit $code
"""


@pytest.fixture
def spec(config, tmp_path):
    """A run of two nodes of two, in a folder whose name has a blank."""

    def make(launch: dict | None = None, device: str = "cpu") -> RunSpec:
        cluster = {"nodes": 2, "ranks_per_node": 2, "device": device}
        return RunSpec.of(config(name="mix", cluster=cluster, launch=launch or {}), tmp_path / "a run")

    return make


def check_syntax(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_script_says_what_it_needs(spec):
    options = {"partition": "gpu", "time": "04:00:00", "exclusive": True, "requeue": None, "mem": 0}
    text = slurm.script(spec({"slurm": options}, "cuda"))
    check_syntax(text)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in (
        "job-name=mix", "nodes=2", "ntasks-per-node=2", "gpus-per-node=2",
        "partition=gpu", "time=04:00:00", "exclusive", "requeue", "mem=0",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines


def test_launch_slurm_wins(spec):
    text = slurm.script(spec({"slurm": {"gres": "gpu:h100:2", "job-name": "other"}}, "cuda"))
    assert "#SBATCH --gres=gpu:h100:2" in text and "gpus-per-node" not in text
    assert "#SBATCH --job-name=other" in text and "job-name=mix" not in text


def test_auto_asks_for_no_gpus_and_says_so(spec):
    text = slurm.script(spec(device="auto"))
    check_syntax(text)
    assert "gpus-per-node" not in text and "# cluster.device is auto, so no GPUs are asked for" in text


def test_false_takes_an_option_away(spec):
    text = slurm.script(spec({"slurm": {"gpus-per-node": False, "exclusive": False}}, "cuda"))
    assert "#SBATCH --gpus-per-node" not in text and "#SBATCH --exclusive" not in text


@pytest.mark.parametrize("options", [{"-p": "gpu"}, {"Partition": "gpu"}, {"--time": "1"}, {"time": 1.5}])
def test_what_is_no_option_is_refused(config, options):
    with pytest.raises(ValidationError):
        config(launch={"slurm": options})


@pytest.mark.parametrize("value", ["1\nrm -rf /", "", "a\tb"])
def test_a_value_that_a_line_cannot_hold_is_refused(spec, value):
    with pytest.raises(LaunchError, match=r"launch\.slurm\.time is .*\n    remedy: key: true for an option without"):
        slurm.script(spec({"slurm": {"time": value}}))


@pytest.mark.parametrize("folder", ["a\\frac", "a\nb"])
def test_a_folder_that_srun_cannot_write_to_is_refused(spec, tmp_path, folder):
    with pytest.raises(LaunchError, match=r"remedy: set output\.runs"):
        slurm.script(replace(spec(), run_dir=tmp_path / folder))


def test_per_cents_of_a_folder_are_not_expanded_by_srun(spec, tmp_path):
    text = slurm.script(replace(spec(), run_dir=tmp_path / "100%t it's"))
    check_syntax(text)
    (word,) = [w for w in shlex.split(text[text.index("    srun ") :].partition("bash -c")[0]) if "--output" in w]
    assert word == f"--output={tmp_path}/100%%t it's/logs/rank-%t.log"


def run_script(spec: RunSpec, tmp_path: Path, worker: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the script of `spec` with stand-ins for srun and scontrol, and `worker` as the code of all tasks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho node-7; echo node-8\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "worker.py").write_text(worker)
    python = tools / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} {tools}/worker.py "$@"\n')
    python.chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "RANKS": "4", "SLURM_CPUS_ON_NODE": "6"}
    env |= {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "node-[7-8]", **more}
    text = slurm.script(spec, str(python))
    return subprocess.run(["bash"], input=text, text=True, env=env, capture_output=True, timeout=600)


WORKER = """
import json, os, sys
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MINE",
        "SRUN_CPUS_PER_TASK")
print(json.dumps([sys.argv[1:]] + [os.environ.get(key) for key in keys]))
"""


FAILING = """
import os, sys
if os.environ["RANK"] == "2":
    open(sys.argv[4] + "/errors/rank-2.txt", "w").write("no text\\n")
    sys.exit(2)
"""


def test_every_task_becomes_a_rank(spec, tmp_path):
    run = spec({"env": {"MINE": "it's 5 o'clock"}})
    done = run_script(run, tmp_path, WORKER)
    assert (done.returncode, done.stderr) == (0, "")
    for rank in range(4):
        seen = json.loads((run.run_dir / "logs" / f"rank-{rank}.log").read_text())
        assert seen[0] == ["-m", "moesys.train.rank", "moesys.train.worker", str(run.run_dir)]
        assert seen[1:6] == [str(rank), "4", str(rank % 2), "2", "node-7"]
        assert 20000 <= int(seen[6]) < 32000
        assert seen[7:] == ["3", "it's 5 o'clock", None]
    assert load(run.run_dir / "config.yaml").config == run.config
    assert (run.run_dir / "launch.lock").read_text().endswith(" of Slurm job 1234\n")


def test_a_job_leaves_a_folder_alone_that_is_in_use(spec, tmp_path):
    run = spec()
    with locked(run.run_dir):
        text = slurm.script(run).replace("--wait 60", "--wait 0")
        done = subprocess.run(["bash"], input=text, text=True, env={**os.environ}, capture_output=True, timeout=600)
    holder = f"another launch of this run (process {os.getpid()}) has not ended"
    assert (done.returncode, done.stderr) == (1, f"{run.run_dir} is in use: {holder}\n")
    assert not (run.run_dir / "config.yaml").exists()


ACCEPTING = """
import os, sys
if os.environ["RANK"] == "0":
    os.unlink(sys.argv[4] + "/.config.before.yaml")
"""


@pytest.mark.parametrize(
    ("worker", "accepted"), [(ACCEPTING, True), ("raise SystemExit(1)", False)], ids=["accepted", "refused"]
)
def test_a_job_that_workers_refuse_leaves_the_configuration_as_it_was(spec, tmp_path, worker, accepted):
    run = spec()
    (run.run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run.run_dir / "checkpoints" / "step-00000001" / "moesys.json").touch()
    (run.run_dir / "config.yaml").write_text("of before\n")
    assert run_script(run, tmp_path, worker).returncode == (0 if accepted else 1)
    assert ((run.run_dir / "config.yaml").read_text() != "of before\n") is accepted
    assert not (run.run_dir / ".config.before.yaml").exists()


def test_cores_of_a_task_reach_srun(spec, tmp_path):
    run = spec({"slurm": {"cpus-per-task": 5}})
    assert "#SBATCH --cpus-per-task=5" in slurm.script(run)
    run_script(run, tmp_path, WORKER, SLURM_CPUS_PER_TASK="5")
    seen = json.loads((run.run_dir / "logs" / "rank-0.log").read_text())
    assert seen[7:] == ["5", None, "5"]


def test_the_first_error_is_shown_and_attempts_are_counted(spec, tmp_path):
    run = spec({"max_failures": 1})
    done = run_script(run, tmp_path, FAILING)
    assert done.returncode == 2
    assert done.stderr.count("no text\n") == 2
    assert "attempt 1 ended with exit code 2; the first error" in done.stderr


def test_without_sbatch_submission_is_refused(spec, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="there is no sbatch on this machine"):
        slurm.submit(spec())
