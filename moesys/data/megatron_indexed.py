"""Megatron's indexed datasets: tokens in PREFIX.bin, their documents in PREFIX.idx.

megatron-core reads them, memory-mapped. They are never copied: training and held-out tokens are views that gather
documents on demand. Document numbers decide the held-out split.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moesys.config.schema import DataConfig
from moesys.data.division import divide, hashed_numbers
from moesys.data.documents import NOTHING_THERE, absent, located, unreadable
from moesys.errors import DataError, Problem

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the type, sequences, documents + 1; then lengths (int32) and offsets (int64)."""
ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of a token by the code of its type; codes 6 and 7 are floating point."""
ITEM_NAMES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
NO_PACKAGE = "needs the package megatron-core, which is not installed"
INSTALL = "pip install megatron-core, or use another data.kind"


class IndexedTokens:
    """A flat array of tokens, gathered from spans of an indexed dataset when a slice is asked for.

    Args:
        dataset: megatron.core.datasets.indexed_dataset.IndexedDataset.
        sequences: int64 [spans], the sequence that each span lies in.
        begins: int64 [spans], the span's first token in its sequence.
        lengths: int64 [spans], tokens; none is 0.
        vocab_size: ids at or above it are an error when they are read.
    """

    def __init__(self, dataset: Any, sequences: np.ndarray, begins: np.ndarray, lengths: np.ndarray, vocab_size: int):
        self._dataset, self._vocab_size = dataset, vocab_size
        self._sequences, self._begins = sequences, begins
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens [stop - start] of a slice without a step.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("slices of tokens have no step")
        parts = [np.empty(0, self._dataset.index.dtype)]
        span = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[span])
            first = int(self._ends[span - 1]) if span else 0
            count = min(end, stop) - start
            offset = int(self._begins[span]) + start - first
            parts.append(self._dataset.get(int(self._sequences[span]), offset, count))
            start, span = start + count, span + 1
        tokens = np.concatenate(parts)
        self._require_known(tokens)
        return tokens

    def _require_known(self, tokens: np.ndarray) -> None:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self._vocab_size)][0]
            rule = f"token id {wrong} is not in the vocabulary of {self._vocab_size}"
            remedy = "set model.vocab_size, or data.tokenizer to the one that wrote the dataset"
            raise DataError(f"{self._dataset.path_prefix}.bin: {rule}; {remedy}")


def open_tokens(data: DataConfig, vocab_size: int) -> tuple[IndexedTokens, IndexedTokens]:
    """Tokens for training and held-out tokens.

    Raises:
        DataError: megatron-core is missing, the files are damaged or hold no tokens, or an id among
            the first is not in the vocabulary; later ones are found when they are read.
    """
    dataset, lengths = _nonempty(data)
    bounds = np.asarray(dataset.document_indices)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sizes = np.diff(starts[bounds])
    division = divide(sizes, hashed_numbers(len(sizes), data.heldout), data.heldout)
    held = np.repeat(division.heldout, np.diff(bounds))  # of each sequence
    # With a cut, tokens of the first held-out document before it are for training, even inside a sequence.
    end = starts[bounds[division.first]] + division.cut
    ours = np.where(held, np.clip(end - starts[:-1], 0, lengths), lengths)
    train = _view(dataset, np.zeros_like(ours), ours, vocab_size)
    heldout = _view(dataset, ours, lengths - ours, vocab_size)
    for tokens in (train, heldout):
        _ = tokens[: 1 << 20]
    return train, heldout


def open_whole(data: DataConfig, vocab_size: int) -> IndexedTokens:
    """All tokens, held out; `data.heldout` is not used. Raises DataError as `open_tokens`."""
    dataset, lengths = _nonempty(data)
    tokens = _view(dataset, np.zeros_like(lengths), lengths, vocab_size)
    _ = tokens[: 1 << 20]
    return tokens


def _nonempty(data: DataConfig) -> tuple[Any, np.ndarray]:
    """The dataset, and the lengths of its sequences, int64 [S]; not all of them are 0."""
    count_tokens(data)
    dataset = _open(_prefix(data))
    lengths = dataset.sequence_lengths.astype(np.int64)
    if not lengths.sum():
        raise DataError(f"{_prefix(data)}.bin holds no tokens")
    return dataset, lengths


def check(data: DataConfig) -> list[Problem]:
    """Problems if a file is missing, or the index is damaged or shorter than it says."""
    problems = []
    if not _installed():
        problems.append(Problem("data.kind", NO_PACKAGE, INSTALL))
    if not data.path:
        remedy = "name the common PREFIX of the .bin and .idx files"
        return [*problems, Problem("data.path", "is needed with data.kind megatron", remedy)]
    prefix = _prefix(data)
    missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not os.path.isfile(f"{prefix}{suffix}")]
    for path in map(Path, missing):
        if (rule := absent(path)) not in (None, NOTHING_THERE):
            return [*problems, Problem("data.path", str(rule), "make it readable, or name another prefix")]
    if missing:
        remedy = "give the common PREFIX of the .bin and .idx files, relative to the working directory"
        return [*problems, Problem("data.path", f"no such file: {', '.join(missing)}", remedy)]
    try:
        count_tokens(data)
    except DataError as error:
        remedy = "write the dataset again, for example with Megatron's preprocess_data.py"
        return [*problems, Problem("data.path", str(error), remedy)]
    return problems


def count_tokens(data: DataConfig) -> int:
    """All tokens of the dataset, by its index, which is checked whole.

    Raises:
        DataError: the index is none, contradicts itself, or the files are shorter than it says.
    """
    prefix = _prefix(data)
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        with bin_.open("rb") as stream:
            stream.read(1)
        files = [path.stat() for path in (idx, bin_)]
        return _count(idx, bin_, *((status.st_size, status.st_mtime_ns) for status in files))
    except OSError as error:
        raise unreadable(idx, error) from None


@lru_cache(maxsize=16)
def _count(idx: Path, bin_: Path, index: tuple[int, int], tokens: tuple[int, int]) -> int:
    """`count_tokens`, once for files of these sizes and times of change."""
    size, code, lengths, offsets, bounds = _read_index(idx, index[0])
    sizes = lengths.astype(np.int64) * size
    if (wrong := np.flatnonzero(lengths < 0)).size:
        at = int(wrong[0])
        raise DataError(f"{idx} is damaged: sequence {at} has the length {lengths[at]}")
    # All writers write sequences one after another: another offset is damage.
    ends = np.cumsum(sizes)
    if (wrong := np.flatnonzero(offsets != ends - sizes)).size:
        at = int(wrong[0])
        where = f"begins at byte {offsets[at]}, and the lengths before it end at {int(ends[at] - sizes[at])}"
        raise DataError(f"{idx} is damaged: sequence {at} of {ITEM_NAMES[code]} {where}")
    if bounds[0] != 0 or bounds[-1] != len(lengths):
        last = f"the last document ends at sequence {bounds[-1]} of {len(lengths)}"
        raise DataError(f"{idx} is damaged: the first document begins at sequence {bounds[0]}, and {last}")
    if (wrong := np.flatnonzero(np.diff(bounds) < 0)).size:
        at = int(wrong[0])
        raise DataError(f"{idx} is damaged: document {at} begins at sequence {bounds[at]} and ends at {bounds[at + 1]}")
    needed = int(ends[-1])
    if tokens[0] < needed:
        raise DataError(f"{bin_} ends early: it has {tokens[0]} bytes, and its index needs {needed}")
    return needed // size


def _read_index(idx: Path, size: int) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of a token, the code of its type, lengths int32 [S] and offsets int64 [S] of S sequences, and bounds
    int64 [D + 1] of D documents, in sequences."""
    with idx.open("rb") as stream:
        header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{idx} is not an index of a Megatron dataset: it does not begin with MMIDIDX")
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != 1 or code not in ITEM_SIZES:
            raise DataError(f"{idx}: version {version} with tokens of type {code} cannot be read")
        if size < HEADER.size + 12 * sequences + 8 * bounds:
            raise DataError(f"{idx} ends early: it should list {sequences} sequences and {bounds} bounds of documents")
        if not sequences or not bounds:
            raise DataError(f"{idx} lists no sequences, or no documents: the dataset holds no tokens")
        kinds = (("<i4", sequences), ("<i8", sequences), ("<i8", bounds))
        arrays = [np.fromfile(stream, kind, number) for kind, number in kinds]
    return ITEM_SIZES[code], code, arrays[0], arrays[1], arrays[2]


def _prefix(data: DataConfig) -> str:
    """The files' common path; the name of one of the two files is accepted too."""
    return str(located(data.path or "")).removesuffix(".bin").removesuffix(".idx")


def _installed() -> bool:
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


def _open(prefix: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from other packages; a user cannot act on them
            from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError as error:
        raise DataError(f"data.kind megatron {NO_PACKAGE} ({error}); {INSTALL}") from None
    try:
        return IndexedDataset(prefix, multimodal=False, mmap=True)
    except (AssertionError, OSError, ValueError) as error:
        raise DataError(f"cannot open the Megatron dataset {prefix}: {error}") from None


def _view(dataset: Any, begins: np.ndarray, lengths: np.ndarray, vocab_size: int) -> IndexedTokens:
    sequences = np.flatnonzero(lengths)
    return IndexedTokens(dataset, sequences, begins[sequences], lengths[sequences], vocab_size)
