"""The specification of a run for launchers: configuration, folder, size and the environment of its workers."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import moesys
from moesys.config.schema import Config, HeldOutConfig
from moesys.config.secret import hidden, is_secret, resolved

PASSED_ON = (
    "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDA_", "MOESYS_", "OMP_", "GOMP_", "MKL_",
    "KMP_", "HF_", "TOKENIZERS_", "WANDB_", "UCX_", "FI_", "NVSHMEM_", "XDG_", "PYTHON", "LD_LIBRARY_PATH",
)  # fmt: skip
"""Beginnings of the caller's variables that workers get. On a Ray cluster nothing else of the caller's
environment reaches them: workers inherit from the cluster's own processes."""

LATE = ("HF_", "WANDB_", "TOKENIZERS_")
"""Beginnings of variables that nothing reads before a worker's own code runs."""

ASSIGNED_PER_WORKER = ("CUDA_VISIBLE_DEVICES",)
"""Never passed on from the caller: the launcher decides which devices a worker sees."""


@dataclass(frozen=True)
class RunSpec:
    """One run, ready to be launched.

    `config` holds no secrets; `run_dir` is absolute; `world` counts worker processes; `env` is what
    `worker_environment` returns, the same for all workers (RANK and its relatives are added by each launcher).
    """

    config: Config
    run_dir: Path
    world: int
    env: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, config: Config, run_dir: Path | None = None, world: int | None = None) -> RunSpec:
        """The run of `config`; defaults: its own folder, and one worker for every rank of its cluster."""
        config = with_absolute_paths(config, Path.cwd())
        cluster = config.cluster
        folder = Path(config.output.runs) / config.name if run_dir is None else run_dir
        return cls(
            config=hidden(config),
            run_dir=folder.absolute(),
            world=cluster.nodes * cluster.ranks_per_node if world is None else world,
            env=worker_environment(config),
        )


def worker_environment(config: Config, caller: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that workers need, on whatever node they start.

    `caller` is the launching process's environment (default: the real one). `launch.env` wins over it.
    OMP_NUM_THREADS is `launch.threads`, else the caller's, else this node's cores / ranks_per_node.
    Whatever the terminal understands, workers write their logs in UTF-8.

    Raises:
        ConfigError: `launch.env` refers to a variable that the caller lacks.
    """
    caller = os.environ if caller is None else caller
    env = {k: v for k, v in caller.items() if k.startswith(PASSED_ON) and k not in ASSIGNED_PER_WORKER}
    threads = config.launch.threads
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", str(default_threads(cores(), config.cluster.ranks_per_node)))
    env["PYTHONPATH"] = python_path(caller.get("PYTHONPATH", ""))
    env.setdefault("PYTHONUNBUFFERED", "1")  # so that logs can be followed line by line
    env |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    return env | resolved(config.launch.env, caller)


def late_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The part of `env` that workers get only once they run: secrets, and variables that only their libraries read.

    The system that starts them may log its environment, as Ray does.
    """
    return {name: value for name, value in env.items() if is_secret(name, value) or name.startswith(LATE)}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(node_cores: int, ranks_per_node: int) -> int:
    """CPU threads of one worker: an equal share of the node's cores, at least 1."""
    return max(1, node_cores // ranks_per_node)


def python_path(current: str) -> str:
    """`current` (as in $PYTHONPATH) with the folder of this package before it, unless that is installed."""
    root = str(Path(moesys.__file__).resolve().parents[1])
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    parts = [part for part in current.split(os.pathsep) if part]
    if root not in parts and root not in installed:
        parts.insert(0, root)
    return os.pathsep.join(parts)


def with_absolute_paths(config: Config, base: Path) -> Config:
    """`config` with its relative paths taken from `base`: workers may start in another folder.

    The name of a Hugging Face dataset stays as it is unless such a file or folder exists.
    """
    data = config.data
    changes: dict[str, str] = {}
    if data.path is not None and (data.kind != "huggingface" or (base / data.path).exists()):
        changes["path"] = absolute(data.path, base)
    if data.tokenizer != "bytes":
        changes["tokenizer"] = absolute(data.tokenizer, base)
    if data.cache is not None:
        changes["cache"] = absolute(data.cache, base)
    output = config.output.model_copy(update={"runs": absolute(config.output.runs, base)})
    texts = {name: _absolute_text(text, base) for name, text in config.train.eval.items()}
    init = None if config.train.init is None else absolute(config.train.init, base)
    train = config.train.model_copy(update={"eval": texts, "init": init})
    return config.model_copy(update={"data": data.model_copy(update=changes), "output": output, "train": train})


def _absolute_text(text: HeldOutConfig, base: Path) -> HeldOutConfig:
    if text.path is None or (text.kind == "huggingface" and not (base / text.path).exists()):
        return text
    return text.model_copy(update={"path": absolute(text.path, base)})


def absolute(path: str, base: Path) -> str:
    """`path` from the root of the file system; `~` is the user's home."""
    return str(base / Path(path).expanduser())
