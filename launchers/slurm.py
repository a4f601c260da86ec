"""A run as a Slurm batch script, and its submission.

The script starts the workers with plain srun, not with Ray inside Slurm (`ray symmetric-run`). Slurm already does
what Ray would add: it places and starts one process per rank, ends all when one fails, and leaves nothing behind. Ray
would need a head node (for which it waits 30 s at most), ports that clash with those of other users on shared nodes,
and a final `ray stop` that ends every Ray process of the node.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from moesys.config.load import dump
from moesys.config.secret import is_secret
from moesys.errors import LaunchError
from moesys.launchers.command import command_line
from moesys.launchers.spec import RunSpec
from moesys.train import run_folder
from moesys.train.rank import COMMAND

GPU_OPTIONS = {"gpus", "gpus-per-node", "gpus-per-task", "gres"}

TEMPLATE = """\
#!/bin/bash
{options}

# Run {name}: {world} ranks, {per_node} on each of {nodes} nodes.
#
# One srun task per rank. srun ends all tasks when one fails (--kill-on-bad-exit), and puts neighbouring
# ranks on the same node (--distribution=block). Ray is not involved: Slurm does its work.
set -uo pipefail

run_dir={quoted_run_dir}
mkdir -p "$run_dir/logs" "$run_dir/errors"
# One launch at a time for each run folder, as with `moesys launch`, unless the file system has no locks.
exec 9>> "$run_dir/launch.lock"
flock --exclusive --wait 60 --conflict-exit-code 75 9 2> /dev/null
if [ $? -eq 75 ]; then
    echo "$run_dir is in use: another launch of this run (process $(cat "$run_dir/launch.lock")) has not ended" >&2
    exit 1
fi
echo "$$ of Slurm job $SLURM_JOB_ID" > "$run_dir/launch.lock"
# The previous configuration of a run with checkpoints is restored unless the workers accept this one.
before="$run_dir/{before}"
if compgen -G "$run_dir/checkpoints/step-*/moesys.json" > /dev/null && [ ! -e "$before" ]; then
    mv "$run_dir/config.yaml" "$before" 2> /dev/null
fi
trap '[ -e "$before" ] && mv "$before" "$run_dir/config.yaml"' EXIT
cat > "$run_dir/config.yaml" << 'END_OF_CONFIG'
{config}END_OF_CONFIG
{exports}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"
# Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch: without this all tasks share few cores.
[ -n "${{SLURM_CPUS_PER_TASK:-}}" ] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

code=1
for attempt in $(seq 0 {max_failures}); do
    rm -f "$run_dir"/errors/rank-*.txt
    # A port below the kernel's own range, different for each job and attempt.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + attempt) % 12000))
    srun --nodes={nodes} --ntasks={world} --ntasks-per-node={per_node} --distribution=block \\
        --kill-on-bad-exit=1 --open-mode=append --output={log_pattern} \\
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS \\
            LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={per_node}
            exec "$@"' worker {command} 9>&-
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
    further attempts inside the job. Raises `LaunchError` for options and folders that cannot stand in a script.
    """
    if wrong := re.search(r"[\\\x00-\x1f\x7f]", str(spec.run_dir)):
        raise LaunchError(
            f"the run's folder {str(spec.run_dir)!r} has {wrong[0]!r} in its name, which srun's --output does not allow"
            "\n    remedy: set output.runs to another folder"
        )
    config = spec.config
    per_node = config.cluster.ranks_per_node
    command = [python, "-m", "moesys.train.rank", "moesys.train.worker", str(spec.run_dir)]
    share = f"$(( SLURM_CPUS_ON_NODE > {per_node} ? SLURM_CPUS_ON_NODE / {per_node} : 1 ))"
    return TEMPLATE.format(
        options="\n".join(f"#SBATCH --{option}" for option in options(spec)) + gpu_comment(spec),
        name=config.name,
        config=dump(config).rstrip("\n") + "\n",
        world=spec.world,
        per_node=per_node,
        nodes=config.cluster.nodes,
        before=run_folder.BEFORE,
        log_pattern=shlex.quote(f"{str(spec.run_dir).replace('%', '%%')}/logs/rank-%t.log"),
        quoted_run_dir=shlex.quote(str(spec.run_dir)),
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in exports(spec).items()),
        threads=f"${{SLURM_CPUS_PER_TASK:-{share}}}",
        max_failures=config.launch.max_failures,
        command=shlex.join(command),
    )


def options(spec: RunSpec) -> list[str]:
    """The sbatch options without their dashes: ours, then `launch.slurm`, which wins.

    Raises:
        LaunchError: a value that no line of a script can hold.
    """
    config, cluster = spec.config, spec.config.cluster
    given = config.launch.slurm
    chosen = {
        "job-name": config.name,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.ranks_per_node),
        "output": f"slurm-{config.name}-%j.out",  # in the folder of submission: the run's may not exist yet
    }
    if cluster.device == "cuda" and not _asked(given, GPU_OPTIONS):
        chosen["gpus-per-node"] = str(cluster.ranks_per_node)
    for key, value in given.items():
        if isinstance(value, str) and (not value or re.search(r"[\x00-\x1f\x7f]", value)):
            what = "an empty value" if not value else f"{value!r}, which a line of the script cannot hold"
            raise LaunchError(
                f"launch.slurm.{key} is {what}"
                "\n    remedy: key: true for an option without a value, such as exclusive: true; else key: value"
            )
    merged = {**chosen, **given}
    return [_option(key, value) for key, value in merged.items() if value is not False]


def _option(key: str, value: str | int | None) -> str:
    """One option as sbatch reads it; true and null: its name alone."""
    return key if value is None or value is True else f"{key}={shlex.quote(str(value))}"


def _asked(given: Mapping[str, object], names: set[str]) -> bool:
    """True if `launch.slurm` sets one of the options `names`; a value of false keeps moesys from setting them."""
    return not names.isdisjoint(given)


def gpu_comment(spec: RunSpec) -> str:
    """A line for those who left `cluster.device` at auto: the submitting machine cannot see the nodes."""
    if spec.config.cluster.device != "auto" or _asked(spec.config.launch.slurm, GPU_OPTIONS):
        return ""
    return "\n# cluster.device is auto, so no GPUs are asked for: set it to cuda to get one per rank."


def exports(spec: RunSpec) -> dict[str, str]:
    """Variables written into the script. Those of the submitting shell, tokens among them, go with sbatch."""
    fixed = {"PYTHONPATH": spec.env["PYTHONPATH"], "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", COMMAND: command_line()}
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
