"""`moesys eval`: losses of a trained model on held-out texts, computed in parallel as in training."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from moesys import leftovers
from moesys.config.load import dump, run_name
from moesys.config.schema import Config, MeasureConfig, OutputConfig
from moesys.data.check import check_texts
from moesys.data.tokenizers import build_tokenizer
from moesys.errors import ConfigError, FileError, Problem
from moesys.files import read_json, write_json
from moesys.hub.folder import is_folder
from moesys.launchers import preflight
from moesys.launchers.launch import run, workers
from moesys.launchers.progress import LiveDisplay
from moesys.launchers.spec import RunSpec, absolute
from moesys.launchers.stop import StopRequests
from moesys.train import manifest, saved
from moesys.train.validate import load_checked

OWN_LABEL = "held-out"
"""The label of the share of the run's own data."""


def command(arguments: argparse.Namespace) -> int:
    """Evaluate, show the losses, and write them where that was asked for."""
    path = saved.find(arguments.model)
    config = configuration(path, arguments)
    found = evaluated(config, {"own": not arguments.data, "every": arguments.all})
    if isinstance(found, int):
        return found
    show(path, config, found, Console(markup=False))
    if arguments.json is not None:
        write_json(arguments.json, as_json(path, config, found))
    return 0


def configuration(path: Path, arguments: argparse.Namespace) -> Config:
    """The configuration of the evaluation: that of the model with the command's data and overrides.

    Raises:
        ConfigError: everything that is wrong with it, at once.
        CheckpointError, FileError: the model cannot be read.
    """
    base = _of_folder(path, arguments) if is_folder(path) else _of_checkpoint(path, bool(arguments.data))
    overrides = [*_texts(arguments.data), *arguments.overrides]
    if arguments.launcher:
        overrides.append(f"launch.launcher={arguments.launcher}")
    with leftovers.temporary("eval") as folder:
        file = folder / f"{run_name(path)}.yaml"
        file.write_text(base, encoding="utf-8")
        try:
            config = load_checked(file, overrides, with_data=not arguments.data)
            _require_texts(path, config)
            return config
        except ConfigError as error:  # the file is not the user's: name the model in its place
            places = [replace(p, where=str(path) if p.where.startswith(str(file)) else p.where) for p in error.problems]
            raise ConfigError(places) from None


def _require_texts(path: Path, config: Config) -> None:
    """Raise ConfigError if a text is missing, or would be cut into other tokens than a checkpoint was trained with."""
    if problems := check_texts(config):
        raise ConfigError(problems)
    known = None if is_folder(path) else manifest.read(path).tokenizer.get("identity")
    if known not in (None, build_tokenizer(config.data).identity):
        rule = f"is {config.data.tokenizer}, not the tokenizer of the model, so that ids would mean other text"
        raise ConfigError([Problem("data.tokenizer", rule, "leave it out: the model's own is used")])


def _of_checkpoint(path: Path, other_data: bool) -> str:
    """The configuration that wrote a checkpoint, as YAML, without what concerns training's folder and records."""
    meta = manifest.read(path)
    config = saved.configuration(meta)
    runs = Path(config.output.runs)
    output = OutputConfig(tensorboard=False)
    if os.access(runs, os.W_OK):
        output = output.model_copy(update={"runs": str(runs)})
    train: dict[str, Any] = {"init": str(path.absolute())}
    data = config.data
    if (path / str(meta.tokenizer.get("kind"))).is_file():
        data = data.model_copy(update={"tokenizer": str((path / str(meta.tokenizer["kind"])).absolute())})
    if other_data:
        saved.tokenizer(meta, config)  # it is known
        train["eval"] = {}
    kept = config.train.model_copy(update=train)
    changes = {"output": output, "measure": MeasureConfig(), "data": data, "train": kept}
    return dump(config.model_copy(update=changes))


def _of_folder(path: Path, arguments: argparse.Namespace) -> str:
    """A released model as a configuration for this process alone.

    Raises:
        FileError: no data are named: it has none of its own.
    """
    named = any(word.startswith(("data.", "data=", "train.eval")) for word in arguments.overrides)
    if not arguments.data and not named:
        rule = f"{path} is a released model, and has no held-out data of its own"
        raise FileError(f"{rule}\n    remedy: name a text, --data PATH, or another source, data.kind=…")
    longest = read_json(path / "config.json", "copy the folder again").get("max_position_embeddings")
    length = min(longest, 1024) if isinstance(longest, int) else 1024
    base = {
        "model": {"from": str(path.absolute())},
        "train": {"seq_len": length, "global_batch": 1},
        "launch": {"launcher": "local"},
        "output": {"tensorboard": False},
    }
    text: str = yaml.safe_dump(base)
    return text


def _texts(paths: list[Path] | None) -> Iterator[str]:
    """Overrides that name the texts of --data, by their files' names."""
    taken: set[str] = set()
    for path in paths or []:
        name = run_name(path)[:60]
        while name in taken:
            name += "-"
        taken.add(name)
        yield f"train.eval.{name}={json.dumps({'kind': 'text', 'path': str(path)})}"


def evaluated(config: Config, asked: dict[str, bool]) -> dict[str, Any] | int:
    """The results that rank 0 wrote; the exit code of an evaluation that failed.

    Workers on one node write to a temporary folder of it, others to one in `output.runs`, which all nodes see.
    """
    with _folder(config) as folder:
        spec = RunSpec.of(config, folder)
        (folder / "config.yaml").write_text(dump(spec.config), encoding="utf-8")
        write_json(folder / "eval.json", asked)
        launcher = config.launch.launcher
        started = workers(spec, launcher, "moesys.train.evaluate")
        preflight.weights(spec.config, launcher, folder)
        preflight.data(spec.config, launcher, asked["own"])
        with StopRequests() as stop, LiveDisplay(folder, Console(stderr=True)) as progress:
            outcome = run(started, spec, progress, stop)
        if outcome.exit_code:
            print(f"moesys: {outcome.message}", file=sys.stderr)
            return outcome.exit_code
        return read_json(folder / "results.json", "start the command again")


@contextmanager
def _folder(config: Config) -> Iterator[Path]:
    base = None
    if config.cluster.nodes > 1:
        base = Path(absolute(config.output.runs, Path.cwd()))
        base.mkdir(parents=True, exist_ok=True)
    with leftovers.temporary("eval-", base) as folder:
        yield folder


def show(path: Path, config: Config, found: dict[str, Any], console: Console) -> None:
    """Print the losses as a table."""
    table = Table(title=f"{path}, sequences of {config.train.seq_len} tokens", title_justify="left")
    for name in ("text", "sequences", "tokens", "loss", "perplexity", "bits per byte"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for name, text in found["texts"].items():
        figures = [text[key] for key in ("loss", "perplexity", "bits_per_byte")]
        shown = ["" if value is None else f"{value:.4f}" for value in figures]
        if text["loss"] is None:
            shown[0] = "not finite"
        table.add_row(name or OWN_LABEL, f"{text['sequences']:,}", f"{text['tokens']:,}", *shown)
    console.print(table)
    if "" in found["texts"] and found["same_data"] is False:
        console.print("The data are not those of the run: its own held-out loss may be of other text.", soft_wrap=True)


def as_json(path: Path, config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """The losses by text, and what they were computed from; the share of the run's own data is "held-out"."""
    texts = {name or OWN_LABEL: text for name, text in found["texts"].items()}
    facts = {"seq_len": config.train.seq_len, "dtype": config.train.dtype, "world_size": found["world_size"]}
    return {"model": str(path), "texts": texts, **facts}
