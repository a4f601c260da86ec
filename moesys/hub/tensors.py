"""The numbers in a folder's safetensors files, read in slices, and decoded where files are quantised.

files = FolderTensors(folder)
files.read("lm_head.weight", ([0, 1, 2], None))          # three rows, all columns
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesys.errors import FileError
from moesys.hub import quantized
from moesys.hub.folder import AGAIN, BITS, GROUP, Decoded, Folder, TensorEntry
from moesys.hub.mapping import Runs, runs

Indices = Sequence[int] | None
"""Indices along one dim, in the order that is wanted; None: all."""


class FolderTensors:
    """The tensors of a folder.

    Attributes:
        bytes_read: bytes of tensors that were asked of the files.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.bytes_read = 0
        self._open: dict[Path, Any] = {}

    def read(self, name: str, indices: Sequence[Indices]) -> Tensor:
        """Elements of a tensor at `indices`, per dim; float32 where it is quantised, else in the file's type.

        Raises:
            FileError: the file cannot be read.
        """
        found = self.folder.decoded[name]
        if found.kind == "fp8":
            return self._fp8(found, indices)
        if found.kind == "mxfp4":
            return self._mxfp4(found, indices)
        return self._slices(found.entries[0], indices)

    def _fp8(self, found: Decoded, indices: Sequence[Indices]) -> Tensor:
        weight, scale = found.entries
        if not scale.shape:
            return quantized.dequantised(self._slices(weight, indices), self._slices(scale, ()), ())
        blocks = quantized.block_sizes(weight.shape, scale.shape)
        wanted = [range(n) if index is None else index for index, n in zip(indices, weight.shape, strict=True)]
        of_each = [[i // block for i in index] for index, block in zip(wanted, blocks, strict=True)]
        needed = [sorted(set(numbers)) for numbers in of_each]
        places = []
        for numbers, present in zip(of_each, needed, strict=True):
            at = {number: place for place, number in enumerate(present)}
            places.append(torch.tensor([at[number] for number in numbers]))
        factors = self._slices(scale, needed)
        return quantized.dequantised(self._slices(weight, indices), factors, tuple(places))

    def _mxfp4(self, found: Decoded, indices: Sequence[Indices]) -> Tensor:
        expert, column, row = indices
        columns = list(range(found.shape[1])) if column is None else list(column)
        groups = sorted({c // GROUP for c in columns})
        blocks = self._slices(found.entries[0], (expert, row, groups, None))
        scales = self._slices(found.entries[1], (expert, row, groups))
        place = {group: at * GROUP for at, group in enumerate(groups)}
        taken = torch.tensor([place[c // GROUP] + c % GROUP for c in columns])
        return quantized.mxfp4(blocks, scales).index_select(-1, taken).transpose(1, 2)

    def _slices(self, entry: TensorEntry, indices: Sequence[Indices]) -> Tensor:
        """Elements of a tensor of the files; reads runs of neighbouring indices."""
        wanted = [None if i is None or _all(i, size) else i for i, size in zip(indices, entry.shape, strict=True)]
        spans: list[Runs] = [((0, s),) if i is None else runs(i) for i, s in zip(wanted, entry.shape, strict=True)]
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, "pt").__enter__()
            out = self._joined(self._open[entry.file].get_slice(entry.name), spans, entry)
        except (OSError, SafetensorError) as error:
            raise FileError(f"{entry.file}: {entry.name} cannot be read: {error}\n    remedy: {AGAIN}") from None
        for dim, index in enumerate(wanted):
            if index is not None and (place := _places(index)) is not None:
                out = out.index_select(dim, place)
        return out

    def _joined(self, view: Any, spans: list[Runs], entry: TensorEntry) -> Tensor:
        """The elements at the products of all dims' runs."""
        size = [sum(stop - start for start, stop in run) for run in spans]
        self.bytes_read += prod(size) * BITS[entry.dtype] // 8
        if all(len(run) == 1 for run in spans):
            return view[tuple(slice(*run[0]) for run in spans)] if spans else view[...]  # type: ignore[no-any-return]
        out: Tensor | None = None
        ends = [_ends(run) for run in spans]
        for at in product(*(range(len(run)) for run in spans)):
            part = view[tuple(slice(*run[i]) for run, i in zip(spans, at, strict=True))]
            out = part.new_empty(size) if out is None else out
            out[tuple(slice(*end[i]) for end, i in zip(ends, at, strict=True))] = part
        assert out is not None
        return out


def _ends(run: Runs) -> list[tuple[int, int]]:
    """The places of ranges one after another."""
    found, at = [], 0
    for start, stop in run:
        found.append((at, at + stop - start))
        at += stop - start
    return found


def _all(indices: Sequence[int], size: int) -> bool:
    return len(indices) == size and all(i == at for at, i in enumerate(indices))


def _places(wanted: Sequence[int]) -> Tensor | None:
    """Place of each wanted index among the ascending ones; None: they ascend."""
    found = torch.tensor(wanted)
    order = found.argsort()
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return None if torch.equal(places, torch.arange(len(order))) else places
