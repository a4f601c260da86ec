"""Reads a configuration and applies every rule of every floor to it. Needs no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import unicodedata
from collections.abc import Sequence
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

from moesys.config.changes import KINDS, NAMED_MIXERS, Kind, table_key
from moesys.config.load import attempt, in_order, locate
from moesys.config.placeholders import independent
from moesys.config.schema import Config, TrainConfig
from moesys.data.documents import located
from moesys.errors import ConfigError, Problem
from moesys.parallel import dimension


def load_checked(path: Path, overrides: Sequence[str] = (), world: int | None = None, with_data: bool = True) -> Config:
    """The configuration in `path`, legal on `world` ranks (default: its cluster's).

    `with_data`: also check that the data are there and readable (a dry run does not).

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    found = attempt(path, overrides)
    _DATA_ANSWERS.clear()
    if found.config is not None:
        problems = locate(_rules(found.config, world, with_data), found.sources, found.config)
    elif found.tree is not None:
        rules = partial(_rules, world=world, with_data=with_data)
        others, some = independent(found.tree, found.problems, rules)
        problems = in_order([*found.problems, *locate(others, found.sources, some)])
    else:
        problems = list(found.problems)
    if problems or found.config is None:
        raise ConfigError(problems)
    return found.config


_DATA_ANSWERS: dict[str, list[Problem]] = {}
"""Results of the data check by its inputs. It lists folders, and is asked again for each placeholder of a wrong key."""


def _data(config: Config) -> list[Problem]:
    from moesys.data import check as data  # with numpy, which a dry run does without

    asked = repr((config.data, config.train, config.model.vocab_size))
    if asked not in _DATA_ANSWERS:
        _DATA_ANSWERS[asked] = data.check(config)
    return _DATA_ANSWERS[asked]


def _rules(config: Config, world: int | None, with_data: bool) -> list[Problem]:
    """Every rule between keys that `config` breaks."""
    problems = dimension.check(config, world) + training(config.train) + output(config) + engine(config)
    problems += apex(config)
    return problems + ([*_data(config), *gate_files(config)] if with_data else [])


def output(config: Config) -> list[Problem]:
    """Problems of the output: missing packages, and folders that cannot be written."""
    problems = []
    if config.output.wandb and importlib.util.find_spec("wandb") is None:
        rule = "needs the package wandb, which is not installed"
        problems.append(Problem("output.wandb", rule, "pip install wandb, or set it to false"))
    if config.output.tensorboard and importlib.util.find_spec("tensorboard") is None:
        rule = "needs the package tensorboard, which is not installed"
        problems.append(Problem("output.tensorboard", rule, "pip install tensorboard, or set it to false"))
    for key, folder in (("output.runs", config.output.runs), ("data.cache", config.data.cache)):
        if folder is not None and (wrong := no_folder(folder)) is not None:
            problems.append(Problem(key, wrong, "choose another folder"))
    return problems + recording(config) + export(config)


def export(config: Config) -> list[Problem]:
    """Problems of `output.export`: a model that no family's files can hold."""
    o, m = config.output, config.model
    if o.export == "none":
        if not o.export_checkpoints:
            return []
        rule = "needs output.export, which is none"
        return [Problem("output.export_checkpoints", rule, "set output.export: hf")]
    from moesys.hub.choose import NoFamily, choose

    try:
        choose(m if m.vocab_size is not None else m.model_copy(update={"vocab_size": 64}))
    except NoFamily as error:
        rule = str(error).partition("\n    remedy:")[0]
        return [Problem("output.export", rule, "set it to none: moesys generate and moesys eval read checkpoints")]
    return []


def no_folder(given: str) -> str | None:
    """The reason why the folder `given`, which need not exist yet, cannot be written; None if it can."""
    if not given or any(unicodedata.category(letter) == "Cc" for letter in given):
        return "must be the name of a folder, without control characters"
    place = located(given).absolute()
    try:
        while not place.exists():
            place = place.parent
    except OSError as error:
        return f"cannot be a folder: {(error.strerror or str(error)).lower()}"
    if not place.is_dir():
        return "must be a folder, and a file is there" if place == located(given) else f"is below {place}, a file"
    return None if os.access(place, os.W_OK | os.X_OK) else f"cannot be written: {place} may not be changed"


def engine(config: Config) -> list[Problem]:
    """Problems if the engine is not installed."""
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
"""The version of Megatron-Core that the engine needs; the plug-in takes others, too."""


def recording(config: Config) -> list[Problem]:
    """Problems if routing is to be recorded and there is none."""
    moe = config.model.moe
    if not config.output.record_routing:
        return []
    if moe is None:
        rule = "needs MoE layers, and model.moe is absent"
    elif not moe.router.counted:
        rule = f"gate {moe.gate.kind} sends no token to an expert: there is nothing to record"
    else:
        return []
    return [Problem("output.record_routing", rule, "set it to 0")]


def gate_files(config: Config) -> list[Problem]:
    """Problems of the files that the gate reads."""
    moe = config.model.moe
    return moe.router.check_files(config.model.moe_blocks) if moe is not None else []


def decay_steps(config: TrainConfig) -> int:
    """Steps of the final decay of schedule wsd."""
    return config.schedule.decay or max(1, config.steps // 5)


def training(config: TrainConfig) -> list[Problem]:
    """Problems of the training section."""
    s, problems = config.schedule, []
    if s.kind == "wsd" and s.warmup + decay_steps(config) > config.steps:
        rule = f"warmup({s.warmup}) + decay({decay_steps(config)}) must be at most train.steps({config.steps})"
        problems.append(Problem("train.schedule.decay", rule, "shorten one of them or train longer"))
    return problems + resumption(config)


NAMED = (Kind.MEANT, Kind.WEIGHTS)
"""Kinds of keys whose change must be named: it changes numbers, and all weights may fit all the same."""


def resumption(config: TrainConfig) -> list[Problem]:
    """Problems if `train.resume_changed` names keys that need not be named."""
    wanted = [key for key, kind in KINDS.items() if kind in NAMED] + ["data.path", "data.tokenizer"]
    remedy = f"choose from {', '.join(wanted)}"
    return [
        Problem("train.resume_changed", f"{key!r} is not a key whose change must be named", remedy)
        for key in config.resume_changed
        if table_key(key) not in wanted and not (key.startswith(NAMED_MIXERS) and key.count(".") == 2)
    ]


def apex(config: Config) -> list[Problem]:
    """Problems if NVIDIA's apex is asked for and cannot be used."""
    if config.train.optimizer.kind != "apex":
        return []
    key, remedy = "train.optimizer.kind", "set it to adamw"
    problems = []
    if config.engine == "megatron":
        rule = "Megatron-Core takes the fused Adam that it finds itself: Transformer Engine's, else apex's"
        problems.append(Problem(key, rule, f"{remedy}, or set engine: native"))
    if config.cluster.device == "cpu":
        problems.append(Problem(key, "apex computes on a GPU alone, and cluster.device is cpu", remedy))
    elif rule := _lacks_apex():
        problems.append(Problem(key, rule, f"build NVIDIA/apex from source with its CUDA extensions, or {remedy}"))
    return problems


def _lacks_apex() -> str:
    """The reason why NVIDIA's apex cannot be used; "" if it can. Nothing is imported: it may be another project."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "needs NVIDIA apex with its FusedAdam, which is not installed"
    if PathFinder.find_spec("apex.optimizers", found.submodule_search_locations or []) is None:
        return f"needs NVIDIA apex, and {found.origin or found.name} is another project of that name, from the registry"
    return ""
