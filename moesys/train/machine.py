"""Checks that this machine can run the processes of a proof or a benchmark, before any of them starts."""

from __future__ import annotations

import os
from pathlib import Path

from moesys.config.schema import Config
from moesys.errors import LaunchError
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape
from moesys.parallel.memory import estimate
from moesys.words import plural

PROCESS = 250 * 2**20
"""Bytes of a process that has imported torch and joined a process group, before it holds a model."""

PER_CORE = 32
"""Processes, at most, that share a core: more take minutes to start, and time out."""

LEAST_VOCABULARY = 256
"""The assumed vocabulary of a model with an unknown tokenizer: bytes."""

GIB = 2**30


def demand(config: Config, world: int, what: str) -> None:
    """Raise if `world` processes of this machine cannot train `config`: they are too many, or need too much memory.

    Raises:
        LaunchError: with the arithmetic.
    """
    cores = os.cpu_count() or 1
    if world > PER_CORE * cores:
        rule = f"{what} would start {world:,} processes here: at most {PER_CORE} share each of {plural(cores, 'core')}"
        raise LaunchError(f"{rule}\n    remedy: {REMEDY}")
    each, free = on_host(config, world), available()
    if free is not None and world * (PROCESS + each) > free:
        model = f"{each / GIB:.1f} GiB of model" if each else "no model"
        processes = plural(world, "process", "processes")
        rule = (
            f"{what} would start {processes} here of {PROCESS / GIB:.1f} GiB and {model} each, "
            f"{world * (PROCESS + each) / GIB:,.1f} GiB in all: this machine has {free / GIB:,.1f} GiB to give"
        )
        raise LaunchError(f"{rule}\n    remedy: {REMEDY}")


REMEDY = "use fewer ranks and a smaller model of the same parts here (model.layers, model.hidden, model.moe.experts)"


def on_host(config: Config, world: int) -> float:
    """Bytes of host memory that the model takes on the rank with the most; 0 on GPUs."""
    degrees, _ = resolve(config, world)
    if degrees is None or config.cluster.device == "cuda":
        return 0.0
    vocabulary = config.model.vocab_size or LEAST_VOCABULARY
    return max(estimate(step_shape(config, degrees, vocabulary, stage)).total for stage in range(degrees.pp))


def available(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that processes may still take on this machine or in this container; None if the system does not say."""
    found = []
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - used))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        pass
    return min(found) if found else None
