"""A configuration that may be started: read, and every rule of every floor asked. Needs no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from moesys.config.load import load, locate
from moesys.config.schema import Config, TrainConfig
from moesys.data import check as data
from moesys.errors import ConfigError, Problem
from moesys.parallel import dimension
from moesys.train import routing_files


def load_checked(path: Path, overrides: Sequence[str] = (), world: int | None = None, with_data: bool = True) -> Config:
    """The configuration in `path`, legal on `world` ranks (default: its cluster's).

    `with_data`: also that the data are there and readable (not so for a dry run).

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    loaded = load(path, overrides)
    problems = dimension.check(loaded.config, world) + training(loaded.config.train) + output(loaded.config)
    problems += engine(loaded.config)
    if with_data:
        problems += data.check(loaded.config) + replay(loaded.config)
    if problems:
        raise ConfigError(locate(problems, loaded.sources, loaded.config))
    return loaded.config


def output(config: Config) -> list[Problem]:
    """Packages that the output asks for, and whether runs can be written."""
    problems = []
    if config.output.wandb and importlib.util.find_spec("wandb") is None:
        rule = "needs the package wandb, which is not installed"
        problems.append(Problem("output.wandb", rule, "pip install wandb, or set it to false"))
    if config.output.tensorboard and importlib.util.find_spec("tensorboard") is None:
        rule = "needs the package tensorboard, which is not installed"
        problems.append(Problem("output.tensorboard", rule, "pip install tensorboard, or set it to false"))
    runs = Path(config.output.runs)
    if runs.exists() and not runs.is_dir():
        problems.append(Problem("output.runs", "must be a folder, and a file is there", "choose another folder"))
    return problems + recording(config)


def engine(config: Config) -> list[Problem]:
    """Whether the engine is installed."""
    if config.engine == "native":
        return []
    remedy = f"pip install megatron-core=={MEGATRON}.1, or set it to native"
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return [Problem("engine", "needs the package megatron-core, which is not installed", remedy)]
    if found.startswith(f"{MEGATRON}."):
        return []
    return [Problem("engine", f"is made for megatron-core {MEGATRON}, and {found} is installed", remedy)]


MEGATRON = "0.16"
"""The version of Megatron-Core whose parts the engine puts together; the plug-in takes others."""


def recording(config: Config) -> list[Problem]:
    """Whether there is routing to record."""
    moe = config.model.moe
    if not config.output.record_routing:
        return []
    if moe is None:
        rule = "needs MoE layers, and model.moe is absent"
    elif moe.gate.kind in ("soft", "smear"):
        rule = f"gate {moe.gate.kind} sends no token to an expert: there is nothing to record"
    else:
        return []
    return [Problem("output.record_routing", rule, "set it to 0")]


def replay(config: Config) -> list[Problem]:
    """Whether what gate replay needs is there and fits the model."""
    model = config.model
    if model.moe is None or model.moe.gate.kind != "replay" or model.moe.gate.path is None:
        return []
    layers = [layer for layer in range(model.layers) if model.is_moe(layer)]
    rule = routing_files.wrong(Path(model.moe.gate.path), layers, model.moe.experts)
    remedy = "record a run of this model with output.record_routing"
    return [Problem("model.moe.gate.path", rule, remedy)] if rule else []


def decay_steps(config: TrainConfig) -> int:
    """Steps of the final decay of schedule wsd."""
    return config.schedule.decay or max(1, config.steps // 5)


def training(config: TrainConfig) -> list[Problem]:
    """Rules of the training section, and packages that it asks for."""
    o, s, problems = config.optimizer, config.schedule, []
    if o.kind == "apex" and not _has_apex():
        rule = "needs NVIDIA apex with its FusedAdam, which is not installed"
        problems.append(Problem("train.optimizer.kind", rule, "install NVIDIA/apex from source, or use adamw"))
    if s.kind == "wsd" and s.warmup + decay_steps(config) > config.steps:
        rule = f"warmup({s.warmup}) + decay({decay_steps(config)}) must be at most train.steps({config.steps})"
        problems.append(Problem("train.schedule.decay", rule, "shorten one of them or train longer"))
    return problems


def _has_apex() -> bool:
    """Whether NVIDIA's apex is installed, and not the package of the same name on the registry."""
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None
