"""Chooses the device of a run's workers before any of them starts, without torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from moesys.config.schema import ClusterConfig, Config
from moesys.errors import LaunchError
from moesys.words import plural


def visible_gpus(env: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs of this machine that $CUDA_VISIBLE_DEVICES leaves visible."""
    env = os.environ if env is None else env
    present = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    return min(present, len([part for part in chosen.split(",") if part.strip() not in ("", "-1")]))


def choose(cluster: ClusterConfig, gpus: Sequence[int], ranks_per_node: int, where: str) -> str:
    """ "cuda" if enough nodes have a GPU for each of their ranks, else "cpu"; a GPU is never shared.

    `gpus` counts those of each node of `where` (the machine or cluster, for the message). Raises
    `LaunchError` if `cluster.device` is cuda and there are too few.
    """
    enough = sum(count >= ranks_per_node for count in gpus) >= cluster.nodes
    if cluster.device == "cuda" and not enough:
        total = plural(cluster.nodes * ranks_per_node, "GPU")
        needs = f"{total} on {plural(cluster.nodes, 'node')} of {ranks_per_node}"
        raise LaunchError(
            f"the run needs {needs}; {where} has {inventory(gpus)}"
            "\n    remedy: set cluster.nodes and cluster.ranks_per_node to what is there, or device=cpu"
        )
    if cluster.device == "auto":
        return "cuda" if enough else "cpu"
    return cluster.device


def placed(config: Config, world: int, gpus: int | None = None) -> tuple[Config, str]:
    """The configuration for at most `world` processes of this machine, and a note for the user.

    All of them compute on one kind of device, which `cluster.device` then names: each on its own GPU, with NCCL, or on
    the CPU, with gloo. The note is "" unless GPUs stay unused. Raises `LaunchError` as `choose` does.
    """
    gpus = visible_gpus() if gpus is None else gpus
    alone = config.cluster.model_copy(update={"nodes": 1, "ranks_per_node": world})
    kind = choose(alone, [gpus], world, "this machine")
    cluster = config.cluster.model_copy(update={"device": kind})
    word = ""
    if gpus and kind == "cpu" and config.cluster.device == "auto":
        processes = plural(world, "process", "processes")
        word = f"{processes} on the CPU: this machine has {plural(gpus, 'GPU')}, and none is shared"
    return config.model_copy(update={"cluster": cluster}), word


def inventory(gpus: Sequence[int]) -> str:
    """ "2 nodes with 8 GPUs and 1 node with 4 GPUs"."""
    kinds = sorted(Counter(gpus).items(), reverse=True)
    parts = [f"{plural(nodes, 'node')} with {plural(count, 'GPU')}" for count, nodes in kinds]
    return " and ".join(parts) or "no nodes"


def hide_gpus(device: str) -> dict[str, str]:
    """Variables that hide GPUs from a worker whose `device` is the CPU."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
