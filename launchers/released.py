"""`moesys import` and `moesys export`: configurations out of released models, and released models out of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesys.config.schema import ModelConfig
from moesys.config.write import text
from moesys.errors import ConfigError, FileError
from moesys.files import write_new
from moesys.hub.derive import Released, released
from moesys.hub.family import nested
from moesys.hub.fit import Fit, fit
from moesys.hub.folder import is_folder
from moesys.version import __version__
from moesys.words import plural, size_text

HEAD = """\
# {name}: a released model of the family {family}.
# {tensors}.
{notes}#
#     moesys launch {file} --dry-run    # ranks, memory and traffic; starts nothing
#     moesys launch {file}              # trains on from its weights
#
# Add what training needs: parallel, train, data and cluster. `moesys config {file}` shows every key.
# Written by `moesys import`, moesys {version}.
"""


def import_command(folder: Path, to: Path | None) -> int:
    """Print or write the configuration of the released model in `folder`; nothing is loaded but headers.

    Raises:
        ConfigError: config.json says what cannot be followed.
        FileError: files are missing, damaged or of another model; or `to` exists.
    """
    found = released(folder)
    if found.problems:
        raise ConfigError(found.problems)
    model = ModelConfig.model_validate(nested(found.derived.values))
    assert model.vocab_size is not None
    fitted = fit(found.folder, model, model.vocab_size)
    name = to.name if to is not None else "FILE"
    written = _head(found, fitted, name) + text(_tree(found))
    if to is None:
        print(written, end="")
        return 0
    write_new(to, written)
    said = _head(found, fitted, name).splitlines()[: 2 + len(_notes(found, fitted))]
    print("\n".join(line.lstrip("# ") for line in said))
    print(f"{to} is written; start it: moesys launch {to}")
    return 0


def _tree(found: Released) -> dict[str, object]:
    path = str(found.folder.path.resolve())
    values = nested(found.derived.values)
    whole = ModelConfig.model_validate(values).model_dump(mode="json")
    tree: dict[str, object] = {"model": _in_order(values, whole), "train": {"init": path}}
    if found.tokenizer is not None:
        tree["data"] = {"tokenizer": str(found.tokenizer.resolve())}
    return tree


def _in_order(values: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in the order of the schema's keys."""
    return {
        key: _in_order(values[key], inner) if isinstance(inner, dict) and isinstance(values[key], dict) else values[key]
        for key, inner in schema.items()
        if key in values
    }


def _head(found: Released, fitted: Fit, file: str) -> str:
    entries = found.folder.tensors.values()
    files = len({entry.file for entry in entries})
    size = sum(entry.bytes for entry in entries)
    count = plural(len(found.folder.tensors), "tensor")
    tensors = f"{count} in {plural(files, 'file')}, {size_text(size)}: every weight is there"
    notes = "".join(f"# {note}\n" for note in _notes(found, fitted))
    summary, path = found.family.summary, found.folder.path.resolve().name
    return HEAD.format(name=path, family=summary, tensors=tensors, notes=notes, file=file, version=__version__)


def _notes(found: Released, fitted: Fit) -> list[str]:
    notes = [f"Not represented: {note}." for note in found.derived.notes]
    if fitted.left_out:
        shown = ", ".join(fitted.left_out[:5]) + (", …" if len(fitted.left_out) > 5 else "")
        notes.append(f"Left out: {plural(len(fitted.left_out), 'tensor')}: {shown}.")
    return notes


def export_command(path: Path, to: Path, dtype: str | None, shard_size: str, family: str | None) -> int:
    """Write the checkpoint at `path` as the folder `to`, showing progress.

    Raises:
        CheckpointError, FileError, NoFamily: as `moesys.train.export.export`.
    """
    from rich.console import Console
    from rich.progress import Progress

    from moesys.hub.writer import shard_bytes
    from moesys.train import saved
    from moesys.train.export import export

    size, checkpoint = shard_bytes(shard_size), saved.find(path)
    if is_folder(checkpoint):
        raise FileError(f"{path} is a released model already\n    remedy: name a run's folder, or a checkpoint")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"exporting {checkpoint}", total=1.0)
        done = export(checkpoint, to, dtype, size, family, lambda share, name: bar.update(task, completed=share))
    tensors, files = plural(done.tensors, "tensor"), plural(done.files, "file")
    print(f"{checkpoint} is written to {to}: {done.family}, {tensors} in {files}, {size_text(done.bytes)}")
    return 0
