"""Writes, checks and reads the files of a checkpoint, without executing anything in them.

`torch.distributed.checkpoint` keeps tensors in `__RANK_N.distcp`, and their descriptions in `.metadata`, a pickle. A
pickle can call any function by name. So an unpickler reads it that knows the classes of checkpoints and nothing else;
tensors are read with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from moesys.errors import CheckpointError, FileError
from moesys.files import read_json
from moesys.train.failure import FailureKind, kind_of
from moesys.train.manifest import META, crc32, damaged
from moesys.train.saved_shapes import CLASSES, METADATA, scan

KNOWN = {
    **CLASSES,
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
}
"""Module → names that `.metadata` may use."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Reads a checkpoint's tensors by metadata that are checked already."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata that were given."""
        return self._metadata


def read_metadata(folder: Path, part: int = 0, parts: int = 1) -> Metadata:
    """The tensors of a checkpoint and their places; executes nothing.

    Args:
        part, parts: the places in every `parts`-th file are checked, from the `part`-th file on.

    Raises:
        CheckpointError: `.metadata` is missing, damaged, or names what no checkpoint does; or its tensors lie
            outside of the checkpoint's files.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
        if not _listed(folder):
            scan(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
    except OSError as error:
        raise damaged(folder, f"{METADATA} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except Exception as error:  # whatever a damaged pickle makes its reader raise
        raise damaged(folder, f"{METADATA} cannot be read: {str(error) or type(error).__name__}") from None
    try:
        wrong = _misplaced(folder, metadata, part, parts)
    except (AttributeError, TypeError, ValueError):
        wrong = f"{METADATA} holds something else than tensors and their places"
    if wrong:
        raise damaged(folder, wrong)
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def _listed(folder: Path) -> bool:
    """True if moesys.json has a checksum of `.metadata`. It was compared then, and the slow scan is not needed."""
    try:
        return METADATA in read_json(folder / META, "").get("files", {})
    except FileError:
        return False


def _misplaced(folder: Path, metadata: Any, part: int, parts: int) -> str | None:
    """The first of the tensors' places that is not in the checkpoint's files, if any."""
    if not isinstance(metadata, Metadata):
        return f"{METADATA} holds no metadata"
    ends: dict[str, tuple[int, str]] = {}
    for index, place in metadata.storage_data.items():
        name, end = place.relative_path, place.offset + place.length
        if not re.fullmatch(r"\w+\.distcp", name) or place.offset < 0 or place.length < 0:
            return f"{METADATA} has {index.fqn} in {name!r} at {place.offset}"
        if place.transform_descriptors:
            return f"{METADATA} has {index.fqn} in an encoding that this program does not write"
        ends[name] = max(ends.get(name, (0, "")), (end, index.fqn))
    for name in sorted(ends)[part::parts]:
        end, last = ends[name]
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) < end:
            return f"{name} was cut short: it has {size:,} bytes, and {last} ends at {end:,}"
    return None


State = dict[str, dict[str, Any]]
"""Tensors by name, of the model and of the optimizer, as `torch.distributed.checkpoint` takes them."""


def save(state: State, folder: Path) -> None:
    """Write tensors to a folder. Collective over the world.

    Raises:
        CheckpointError: they cannot be written; says why.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.save(state, checkpoint_id=folder)
    except (CheckpointException, OSError) as error:
        raise unwritten(folder, error) from None


def unwritten(folder: Path, error: BaseException) -> CheckpointError:
    """The error of a checkpoint that cannot be written."""
    remedy = "make room or choose another output.runs; the same command goes on from the checkpoint before"
    return CheckpointError(f"{folder} could not be written: {_cause(error)}\n    remedy: {remedy}")


def load(state: State, folder: Path, optional: Collection[str] = ()) -> set[str]:
    """Read tensors into `state`; returns the names that the checkpoint lacks. Collective over the world.

    Args:
        state: loses the tensors that the checkpoint lacks.
        optional: names that may be missing; these tensors keep their values.

    Raises:
        CheckpointError: damaged, or a tensor is missing or of another shape or type; the same on all ranks.
    """
    metadata, wrong, missing = None, None, set[str]()
    place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        metadata = read_metadata(folder, *place)
        missing = _missing(state, metadata, folder)
        if unmet := sorted(missing - set(optional)):
            wrong = _lacks(folder, unmet[0], len(unmet) - 1)
    except CheckpointError as error:
        wrong = str(error)
    except (AttributeError, TypeError) as error:
        wrong = str(damaged(folder, f"{METADATA} holds something else than tensors: {error}"))
    agree(wrong)
    assert metadata is not None
    for section, tensors in state.items():
        state[section] = {name: value for name, value in tensors.items() if f"{section}.{name}" not in missing}
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(state, storage_reader=Reader(folder, metadata))
    except (CheckpointException, Exception) as error:
        if _is_elsewhere(error, folder):
            raise
        raise damaged(folder, _cause(error)) from None
    return missing


def _is_elsewhere(error: BaseException, folder: Path) -> bool:
    """True if the fault is another rank's, or lack of memory: a good checkpoint must not be moved away for that.

    A damaged file may ask for any amount of memory, unless its checksum has been compared.
    """
    kind = kind_of(error)
    return kind in (FailureKind.LOST, FailureKind.TIMEOUT) or (kind is FailureKind.MEMORY and _listed(folder))


def agree(wrong: str | None) -> None:
    """Raise the first rank's `wrong` on every rank, if any rank has one. Collective over the world, if there is one."""
    everyone: list[Any] = [wrong]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, wrong)
    if error := next((text for text in everyone if text is not None), None):
        raise CheckpointError(error)


def _missing(state: State, metadata: Metadata, folder: Path) -> set[str]:
    """Names of tensors that the checkpoint lacks; raises CheckpointError if one has another shape or type there."""
    missing = set()
    for section, tensors in state.items():
        for name, wanted in tensors.items():
            key = f"{section}.{name}"
            found = metadata.state_dict_metadata.get(key)
            if found is None:
                missing.add(key)
            elif not isinstance(found, TensorStorageMetadata):
                raise damaged(folder, f"{METADATA} has no tensor at {key}")
            elif found.size != wanted.size():
                rule = f"{key} has the shape {list(found.size)} there, and {list(wanted.size())} in this model"
                raise CheckpointError(f"{folder} is of another model: {rule}\n    remedy: {OTHER}")
            elif found.properties.dtype.is_floating_point != wanted.dtype.is_floating_point:
                raise damaged(folder, f"{key} is of {found.properties.dtype} there, and should be of {wanted.dtype}")
    return missing


OTHER = "restore the keys of the model that it was written with, which its moesys.json has, or choose another run name"


def _lacks(folder: Path, name: str, others: int) -> str:
    more = f" and {others} more" if others else ""
    return f"{folder} lacks {name}{more}, which this configuration needs\n    remedy: {OTHER}"


def checksums(folder: Path, rank: int) -> dict[str, list[int]]:
    """[bytes, CRC-32] of the files that `rank` wrote, by name; the first rank's are also those of no rank."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    mine = [n for n in names if n.startswith(f"__{rank}_") or (rank == 0 and not n.endswith(".distcp"))]
    return {name: [(folder / name).stat().st_size, crc32(folder / name)] for name in mine}


def _cause(error: BaseException) -> str:
    """The first rank's error, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = error.failures[min(error.failures)]
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
