"""`moesys eval --tasks`: EleutherAI's lm-evaluation-harness on a trained model, in one process, through transformers.

The model is exported to a temporary folder first, unless it is a released model's folder already.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesys import leftovers
from moesys.errors import FileError, MoesysError
from moesys.files import write_json
from moesys.hub.folder import is_folder
from moesys.train import saved

INSTALL = 'pip install "moesys[eval]"'
NEEDED = ("lm_eval", "transformers", "accelerate")


def command(arguments: argparse.Namespace) -> int:
    """Run the tasks, show their metrics, and write them where that was asked for."""
    require_packages()
    tasks, folders = named(arguments.tasks)
    path = saved.find(arguments.model)
    with _folder(path) as folder:
        results = run(folder, tasks, folders, arguments.limit)
    Console(markup=False).print(table(str(path), results))
    if arguments.json is not None:
        write_json(arguments.json, {"model": str(path), "limit": arguments.limit, "tasks": results})
    return 0


def require_packages() -> None:
    """Raise MoesysError if a package is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        rule = f"--tasks: needs the package {missing[0]}, which is not installed"
        raise FileError(f"{rule}\n    remedy: {INSTALL}")


def named(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The names of tasks, and the folders in which those that were given as files lie with what they include.

    Raises:
        FileError: a file is missing, or names no task.
    """
    names, folders = [], []
    for word in words:
        if not word.endswith((".yaml", ".yml")):
            names.append(word)
            continue
        path = Path(word)
        if not path.is_file():
            raise FileError(f"--tasks: {path}: no such file\n    remedy: name a task of the harness, or its YAML file")
        found = re.search(r"^(?:task|group):\s*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if found is None:
            raise FileError(f"--tasks: {path} names no task\n    remedy: give it a line task: NAME")
        names.append(found[1])
        folders.append(path.absolute().parent)
    return names, list(dict.fromkeys(folders))


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A folder that transformers opens, of the model at `path`."""
    if is_folder(path):
        yield path
        return
    from moesys.train.export import export

    with leftovers.temporary("eval") as place:
        print(f"exporting {path} …", flush=True)
        yield export(path, place / "model").to


def run(folder: Path, tasks: Sequence[str], folders: Sequence[Path], limit: int | None) -> dict[str, dict[str, Any]]:
    """The metrics of each task, as the harness names them: "acc,none" and "acc_stderr,none".

    Args:
        folder: of a model that transformers opens.
        folders: with YAML files of tasks, beside the harness's own.
        limit: examples of each task at most.

    Raises:
        FileError: there is no such task.
        MoesysError: the harness fails; says how.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(path) for path in folders] or None)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        rule = f"--tasks: lm-evaluation-harness has no task {unknown[0]}"
        raise FileError(f"{rule}\n    remedy: lm-eval ls tasks lists its tasks; or name a task's YAML file")
    try:
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "auto"},
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=1,
            limit=limit,
            log_samples=False,
        )
    except Exception as error:  # whatever the harness, its tasks' code and their data raise
        reason = f"{type(error).__name__}: {error}"
        raise MoesysError(f"lm-evaluation-harness failed: {reason}\n    remedy: {REMEDY}") from error
    assert found is not None
    return {name: dict(metrics) for name, metrics in found["results"].items()}


REMEDY = "tasks load their data from the network, unless their YAML names files (dataset_path: json, dataset_kwargs)"


def table(model: str, results: dict[str, dict[str, Any]]) -> Table:
    """A row for each metric of each task, with its standard error."""
    shown = Table(title=model, title_justify="left")
    for name in ("task", "metric", "value", "± standard error"):
        shown.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not isinstance(value, (int, float)) or not kind or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            label = name if kind == "none" else f"{name}, {kind}"
            shown.add_row(task, label, f"{value:.4f}", f"{error:.4f}" if isinstance(error, (int, float)) else "")
    return shown
