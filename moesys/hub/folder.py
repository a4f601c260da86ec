"""A folder of a released model: its configuration, and the headers of its safetensors files. Needs no torch.

folder = open_folder(Path("Mixtral-8x7B-v0.1"))
folder.config["model_type"]                       # "mixtral"
folder.tensors["model.norm.weight"].shape         # (4096,)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from moesys.errors import FileError
from moesys.files import read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ENDING = ".safetensors"
LONGEST_HEADER = 100_000_000
"""Bytes of a header that safetensors' own reader accepts at most."""
BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
"""Bits of an element by the name of its type."""
FP8 = ("F8_E4M3", "F8_E5M2")
FACTORS = ("_scale_inv", "_scale")
"""Endings of the names of FP8 tensors' factors."""
BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the names of the two tensors of one in MXFP4."""
GROUP = 32
"""Elements with one exponent in MXFP4."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: its name, the file, its type as safetensors names it, and its shape."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Decoded:
    """A tensor as it is when it is decoded (`moesys.hub.quantized`).

    Attributes:
        kind: how it lies in the files: as it is, FP8 with a factor per block, or MXFP4.
        shape: decoded.
        entries: the tensors of the files that it is made of; for quantised ones numbers and factors.
    """

    kind: Literal["plain", "fp8", "mxfp4"]
    shape: tuple[int, ...]
    entries: tuple[TensorEntry, ...]


def _scale(entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> TensorEntry:
    found = next((entries[entry.name + end] for end in FACTORS if entry.name + end in entries), None)
    if found is None:
        raise FileError(
            f"{entry.file}: {entry.name} is of 8 bits, and its factors {entry.name}{FACTORS[0]} are missing"
        )
    fits = len(found.shape) == len(entry.shape) and all(a <= b for a, b in zip(found.shape, entry.shape, strict=True))
    if found.shape and not fits:
        rule = f"has the shape {list(found.shape)}, which does not fit {entry.name} of {list(entry.shape)}"
        raise FileError(f"{found.file}: {found.name} {rule}")
    return found


@dataclass(frozen=True)
class Folder:
    """A folder with config.json and safetensors files."""

    path: Path
    config: Mapping[str, Any]

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by its name.

        Raises:
            FileError: a file is missing, cut short or damaged; a tensor is twice there, or the index and a file differ.
        """
        files = _files(self.path)
        index = self._index()
        found: dict[str, TensorEntry] = {}
        for file in files if index is None else sorted({self.path / name for name in index.values()}):
            for entry in header(file):
                if index is not None and index.get(entry.name) != file.name:
                    continue  # another shard holds it, as the index says
                if entry.name in found:
                    rule = f"{entry.name} is in {found[entry.name].file.name} and in {file.name}"
                    raise FileError(f"{self.path}: {rule}\n    remedy: {AGAIN}")
                found[entry.name] = entry
        for name, file_name in (index or {}).items():
            if name not in found:
                rule = f"{INDEX} has {name} in {file_name}, which lacks it"
                raise FileError(f"{self.path}: {rule}\n    remedy: {AGAIN}")
        return found

    @cached_property
    def decoded(self) -> dict[str, Decoded]:
        """Every tensor as it is when it is decoded; the factors of quantised tensors are part of these.

        Raises:
            FileError: as `tensors`; or a quantised tensor lacks its factors.
        """
        entries, found, factors = self.tensors, dict[str, Decoded](), set[str]()
        for name, entry in entries.items():
            if entry.dtype in FP8:
                scale = _scale(entry, entries)
                found[name] = Decoded("fp8", entry.shape, (entry, scale))
                factors.add(scale.name)
            elif name.endswith(BLOCKS) and (base := name.removesuffix(BLOCKS)) + SCALES in entries:
                experts, rows, groups, _ = entry.shape
                found[base] = Decoded("mxfp4", (experts, groups * GROUP, rows), (entry, entries[base + SCALES]))
                factors |= {name, base + SCALES}
            else:
                found[name] = Decoded("plain", entry.shape, (entry,))
        return {name: tensor for name, tensor in found.items() if name not in factors}

    def _index(self) -> dict[str, str] | None:
        path = self.path / INDEX
        if not path.exists():
            return None
        found = read_json(path, AGAIN).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(v, str) and "/" not in v for v in found.values()):
            raise FileError(f"{path}: weight_map must map each tensor to a file\n    remedy: {AGAIN}")
        for name, file in found.items():
            if not (self.path / file).is_file():
                raise FileError(f"{self.path}: {file}, which holds {name}, is missing\n    remedy: {AGAIN}")
        return found


AGAIN = "copy or download the folder's files again"


def is_folder(path: Path) -> bool:
    """True if `path` is a folder of a released model."""
    return (path / CONFIG).is_file()


def open_folder(path: Path) -> Folder:
    """The released model at `path`; headers are read when they are asked for.

    Raises:
        FileError: it is no folder, or its config.json is missing or damaged.
    """
    if not path.is_dir():
        rule = "is no folder" if path.exists() else "does not exist"
        raise FileError(f"{path} {rule}\n    remedy: name a folder that holds {CONFIG} and safetensors files")
    if not (path / CONFIG).is_file():
        raise FileError(
            f"{path} has no {CONFIG}\n    remedy: name a folder as Hugging Face's save_pretrained writes it"
        )
    return Folder(path, read_json(path / CONFIG, AGAIN))


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob(f"*{ENDING}"))
    if not files:
        rule = f"{path} has no {ENDING} file"
        if any(path.glob("*.bin")):
            rule += "; .bin files are pickles, which can run any program when they are read"
        raise FileError(f"{rule}\n    remedy: convert it with transformers: from_pretrained, then save_pretrained")
    return files


def header(file: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file.

    Raises:
        FileError: it cannot be read, or is damaged: cut short, or not what its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= min(LONGEST_HEADER, size - 8):
                raise FileError(f"{file} is damaged: it is no safetensors file, or cut short\n    remedy: {AGAIN}")
            found = json.loads(content.read(length))
        entries = [
            (n, t["dtype"], tuple(t["shape"]), t["data_offsets"]) for n, t in found.items() if n != "__metadata__"
        ]
        end = 8 + length + max((offsets[1] for _, _, _, offsets in entries), default=0)
    except OSError as error:
        raise FileError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise FileError(f"{file} is damaged: its header cannot be read\n    remedy: {AGAIN}") from None
    if size != end:
        rule = f"has {size:,} bytes, and should have {end:,}"
        last = max(entries, key=lambda entry: entry[3][1])[0] if entries else "nothing"
        rule = f"is damaged: it {rule}; {last} lies at its end"
        raise FileError(f"{file} {rule}\n    remedy: {AGAIN}")
    return [_entry(file, name, dtype, shape, offsets) for name, dtype, shape, offsets in entries]


def _entry(file: Path, name: str, dtype: str, shape: tuple[int, ...], offsets: list[int]) -> TensorEntry:
    if dtype not in BITS:
        raise FileError(f"{file}: {name} is of the type {dtype}, which this version cannot read")
    entry = TensorEntry(name, file, dtype, shape)
    if offsets[1] - offsets[0] != entry.bytes:
        rule = f"is damaged: {name} of shape {list(shape)} has {offsets[1] - offsets[0]:,} bytes there"
        raise FileError(f"{file} {rule}\n    remedy: {AGAIN}")
    return entry
