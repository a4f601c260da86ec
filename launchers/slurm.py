"""A run as a Slurm batch script, and its submission.

The script starts the workers with plain srun, not with Ray inside Slurm (`ray symmetric-run`). Slurm does
already what Ray would add: it places and starts one process per rank, ends all when one fails, and leaves
nothing behind. Ray would bring a head node to wait for (30 s and no longer), ports that clash with those
of other users on shared nodes, and a `ray stop` at the end that takes every Ray process of the node along.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from moesys.config.load import dump
from moesys.config.secret import is_secret
from moesys.errors import LaunchError
from moesys.launchers.spec import RunSpec

GPU_OPTIONS = {"gpus", "gpus-per-node", "gpus-per-task", "gres"}

TEMPLATE = """\
#!/bin/bash
{options}

# Run {name}: {world} ranks, {per_node} on each of {nodes} nodes.
#
# One srun task per rank. srun ends all tasks when one fails (--kill-on-bad-exit), and puts neighbouring
# ranks on the same node (--distribution=block). Ray is not involved: Slurm itself does what it would do.
set -uo pipefail

run_dir={quoted_run_dir}
mkdir -p "$run_dir/logs" "$run_dir/errors"
cat > "$run_dir/config.yaml" << 'END_OF_CONFIG'
{config}END_OF_CONFIG
{exports}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

code=1
for attempt in $(seq 0 {max_failures}); do
    rm -f "$run_dir"/errors/rank-*.txt
    # Below the kernel's own ports, and another one for each job and attempt.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + attempt) % 12000))
    srun --nodes={nodes} --ntasks={world} --ntasks-per-node={per_node} --distribution=block \\
        --kill-on-bad-exit=1 --open-mode=append --output="$run_dir/logs/rank-%t.log" \\
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS \\
            LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={per_node}
            exec "$@"' worker {command}
    code=$?
    [ "$code" -eq 0 ] && break
    first="$(ls -tr "$run_dir"/errors/rank-*.txt 2>/dev/null | head -n 1)"
    echo "attempt $attempt ended with exit code $code; the first error, ${{first:-not written}}:" >&2
    [ -n "$first" ] && cat "$first" >&2
done
exit "$code"
"""


def script(spec: RunSpec, python: str = sys.executable) -> str:
    """The batch script of a run, complete text; `python` is the interpreter on the nodes.

    Workers resume from the newest checkpoint by themselves, so `launch.max_failures` becomes that many
    further attempts inside the job. Raises `LaunchError` for options that cannot stand in a script.
    """
    config = spec.config
    per_node = config.cluster.ranks_per_node
    command = [python, "-m", "moesys.train.worker", str(spec.run_dir)]
    return TEMPLATE.format(
        options="\n".join(f"#SBATCH --{option}" for option in options(spec)) + gpu_comment(spec),
        name=config.name,
        config=dump(config).rstrip("\n") + "\n",
        world=spec.world,
        per_node=per_node,
        nodes=config.cluster.nodes,
        run_dir=spec.run_dir,
        quoted_run_dir=shlex.quote(str(spec.run_dir)),
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in exports(spec).items()),
        threads=f"$(( SLURM_CPUS_ON_NODE > {per_node} ? SLURM_CPUS_ON_NODE / {per_node} : 1 ))",
        max_failures=config.launch.max_failures,
        command=shlex.join(command),
    )


def options(spec: RunSpec) -> list[str]:
    """The sbatch options without their dashes: ours, then `launch.slurm`, which wins."""
    config, cluster = spec.config, spec.config.cluster
    given = config.launch.slurm
    chosen = {
        "job-name": config.name,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.ranks_per_node),
        "output": f"slurm-{config.name}-%j.out",  # in the folder of submission: the run's may not exist yet
    }
    if cluster.device == "cuda" and not GPU_OPTIONS & given.keys():
        chosen["gpus-per-node"] = str(cluster.ranks_per_node)
    for key, value in given.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or "\n" in value:
            raise LaunchError(
                f"launch.slurm.{key} is {value!r}: not an option of sbatch"
                '\n    remedy: long options without dashes, for example {partition: gpu, time: "04:00:00"}'
            )
    return [f"{key}={shlex.quote(value)}" if value else key for key, value in (chosen | given).items()]


def gpu_comment(spec: RunSpec) -> str:
    """A line for those who left `cluster.device` at auto: the submitting machine cannot see the nodes."""
    if spec.config.cluster.device != "auto" or GPU_OPTIONS & spec.config.launch.slurm.keys():
        return ""
    return "\n# cluster.device is auto, so no GPUs are asked for: set it to cuda to get one per rank."


def exports(spec: RunSpec) -> dict[str, str]:
    """Variables written into the script. Those of the submitting shell, tokens among them, go with sbatch."""
    fixed = {"PYTHONPATH": spec.env["PYTHONPATH"], "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if spec.config.launch.threads is not None:
        fixed["OMP_NUM_THREADS"] = str(spec.config.launch.threads)
    return fixed | {name: spec.env[name] for name in spec.config.launch.env if name not in secrets(spec)}


def secrets(spec: RunSpec) -> dict[str, str]:
    """Variables of `launch.env` that are not written: sbatch gets them in its environment, and passes that on."""
    given = {name: spec.env[name] for name in spec.config.launch.env}
    return {name: value for name, value in given.items() if is_secret(name, value)}


def submit(spec: RunSpec) -> int:
    """Write the script into the run's folder and hand it to sbatch; returns sbatch's exit code.

    Raises `LaunchError` where there is no sbatch.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        remedy = "print the script with --dry-run and submit it where there is one"
        raise LaunchError(f"there is no sbatch on this machine\n    remedy: {remedy}")
    path = write(spec)
    return subprocess.run([sbatch, str(path)], env={**os.environ, **secrets(spec)}).returncode


def write(spec: RunSpec) -> Path:
    """Write the script to job.sbatch in the run's folder; returns its path."""
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    path = spec.run_dir / "job.sbatch"
    path.write_text(script(spec))
    return path
