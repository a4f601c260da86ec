"""Recorded routing on disk: one .npz file per step and rank. Needs no torch.

For each MoE layer N of the rank (the number of its block): `N.number` int64 [T], the tokens' numbers; `N.expert` int16
[T, K], −1 if a token has fewer assignments; `N.weight` float16 [T, K]. `experts`: the number of experts of a layer.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesys.errors import DataError

PATTERN = "step-*-rank-*.npz"
NAME = re.compile(r"step-(\d{1,18})-rank-(\d{1,9})\.npz")
DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError),
    *(NotImplementedError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""Errors that numpy and zipfile raise for damaged files."""
Arrays = tuple[Any, Any, Any]
"""number [T], expert [T, K] and weight [T, K] of one layer."""


def block(name: str) -> int:
    """The number of a layer's block: 3 of "layers.3.ffn"."""
    return int(name.split(".")[1])


def write(folder: Path, step: int, rank: int, layers: dict[int, Arrays], experts: int) -> None:
    """Write the routing of `rank` in `step`."""
    arrays: dict[str, Any] = {"experts": np.int64(experts)}
    for layer, parts in layers.items():
        arrays |= {f"{layer}.{key}": part for key, part in zip(("number", "expert", "weight"), parts, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}-rank-{rank:05d}.npz"
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def forget(folder: Path, step: int) -> None:
    """Remove the recordings of steps after `step`."""
    for path in folder.glob(PATTERN):
        if (name := NAME.fullmatch(path.name)) and int(name[1]) > step:
            path.unlink()


def read(folder: Path, layer: int) -> tuple[int, np.ndarray]:
    """The first token's number, and the experts int16 [N, K] of all tokens from it on, in a layer.

    Raises:
        DataError: there is no recording, or not of every token of this layer.
    """
    number, parts = numbers(folder, layer)
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts]
    return int(number.min()), np.concatenate(padded)[number.argsort()]


def numbers(folder: Path, layer: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Numbers of all tokens, and their experts, file by file. Raises DataError as `read`."""
    found = [(file[f"{layer}.number"], file[f"{layer}.expert"]) for file in _files(folder) if f"{layer}.number" in file]
    if not found:
        raise DataError(f"{folder} holds no routing of layer {layer}: it was recorded with another model")
    number = np.concatenate([part for part, _ in found])
    if len(np.unique(number)) != len(number) or int(np.ptp(number)) + 1 != len(number):
        raise DataError(f"{folder} lacks tokens of layer {layer}, or has some twice: files are missing, or of two runs")
    return number, [part for _, part in found]


def wrong(folder: Path, layers: Iterable[int], experts: int) -> str | None:
    """The fault of a recording for a model with these MoE layers; None if it fits."""
    try:
        recorded = {int(file["experts"]) for file in _files(folder)}
        if recorded != {experts}:
            found = ", ".join(map(str, sorted(recorded)))
            return f"{folder} was recorded with {found} experts per layer, and model.moe.experts is {experts}"
        for layer in layers:
            numbers(folder, layer)
    except DataError as error:
        return str(error)
    return None


def assignments(folder: Path) -> Iterator[tuple[int, int, list[int]]]:
    """For each file: its rank, the experts of a layer, and the rank's assignments to each expert, summed over layers.

    Raises:
        DataError: there is no recording.
    """
    for path, file in zip(_paths(folder), _files(folder), strict=True):
        experts = int(file["experts"])
        chosen = [part[part >= 0] for name, part in file.items() if name.endswith(".expert")]
        counts = sum((np.bincount(part, minlength=experts) for part in chosen), np.zeros(experts, dtype=np.int64))
        name = NAME.fullmatch(path.name)
        assert name is not None  # as _paths gives them
        yield int(name[2]), experts, counts.tolist()


def _files(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The numbers and experts of all files of a recording, one by one."""
    for path in _paths(folder):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if not name.endswith(".weight")}
            fault = _wrong(arrays)
        except DAMAGE:
            fault = "is no recorded routing, or was cut short"
        if fault:
            raise DataError(f"{path} {fault}\n    remedy: record the run's routing again, or remove the folder")
        yield arrays


def _wrong(arrays: dict[str, np.ndarray]) -> str:
    """The fault in the arrays of a file; "" if there is none."""
    experts = arrays["experts"]
    if experts.shape != () or experts.dtype.kind not in "iu" or not 1 <= experts <= 2**20:
        return "does not say how many experts a layer has"
    for name, part in arrays.items():
        if not name.endswith(".expert"):
            continue
        number = arrays[f"{name.removesuffix('.expert')}.number"]
        if part.ndim != 2 or number.shape != part.shape[:1] or {part.dtype.kind, number.dtype.kind} - set("iu"):
            return f"has {name} of shape {part.shape} for tokens of shape {number.shape}"
        if part.size and not (part.min() >= -1 and part.max() < experts):
            return f"has {name} from {part.min()} to {part.max()}, and {experts} experts"
    return ""


def _paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    paths = sorted(path for path in folder.glob(PATTERN) if NAME.fullmatch(path.name))
    if not paths:
        raise DataError(f"{folder} holds no recorded routing ({PATTERN})")
    return paths
