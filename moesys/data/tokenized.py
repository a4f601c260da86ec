"""Tokenizes documents into two flat arrays, streamed into .npy files: memory holds one batch of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from moesys.data.division import Division, divide, hashed_names
from moesys.data.documents import Document
from moesys.data.progress import Progress
from moesys.data.tokenizers import Tokenizer, token_dtype
from moesys.errors import DataError

HEADER_BYTES = 128
BATCH_BYTES = 4 << 20
"""Text that is tokenized at once."""


class TokenFile:
    """A one-dimensional .npy file (NEP 1, version 1.0) written piece by piece.

    Args:
        file: empty, writable, at its beginning.
        dtype: of the tokens.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file, self._dtype, self.tokens = file, dtype, 0
        file.write(b"\0" * HEADER_BYTES)

    def append(self, tokens: np.ndarray) -> None:
        """Write tokens [T] after those already there."""
        self._file.write(np.ascontiguousarray(tokens, self._dtype).data)
        self.tokens += len(tokens)

    def finish(self) -> None:
        """Write the header, which says how many tokens there are."""
        description = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({self.tokens},), }}"
        text = description.ljust(HEADER_BYTES - 11) + "\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii"))
        self._file.flush()


def from_memory(buffer: memoryview, dtype: np.dtype) -> np.ndarray:
    """The tokens [T] of a finished `TokenFile` that was written to memory."""
    return np.frombuffer(buffer, dtype, offset=HEADER_BYTES)


def write(
    documents: Callable[[], Iterator[Document]],
    tokenizer: Tokenizer,
    share: float | None,
    train: BinaryIO,
    heldout: BinaryIO,
) -> None:
    """Tokenize documents into two .npy files, each document followed by `tokenizer.end_of_document`.

    The documents are read twice: for the division into training and held-out ones, and for the tokens. Empty documents
    are skipped.

    Args:
        documents: gives the documents, in the same order at every call.
        share: of the text to hold out, see `division`; None: all of it.

    Raises:
        DataError: there is no text, or a document cannot be read.
    """
    names, sizes = [], []
    progress = Progress("tokenizing")
    for document in documents():
        progress.advance()
        if document.text:
            names.append(document.name)
            sizes.append(len(document.text))
    if not names:
        raise DataError("the data hold no text: every document is empty")
    if share is None:
        division = Division(np.ones(len(names), bool))
    else:
        division = divide(np.array(sizes), hashed_names(names, share), share)
    dtype = token_dtype(tokenizer.vocab_size)
    ended = tokenizer.end_of_document is not None
    end = np.array([tokenizer.end_of_document] if ended else [], dtype)
    files = {False: TokenFile(train, dtype), True: TokenFile(heldout, dtype)}
    progress.total = sum(sizes)
    for batch in _batches(_parts(documents(), division)):
        for (held, _), tokens in zip(batch, tokenizer.encode_many([text for _, text in batch]), strict=True):
            files[held].append(tokens)
            files[held].append(end)
        progress.advance(sum(len(text) for _, text in batch))
    for file in files.values():
        file.finish()
    progress.finish()


def _parts(documents: Iterator[Document], division: Division) -> Iterator[tuple[bool, bytes]]:
    """Pairs of (held out, text); a cut document gives two."""
    for number, document in enumerate(document for document in documents if document.text):
        held = bool(division.heldout[number])
        cut = _tidy(document.text, division.cut_of(number)) if held else 0
        if cut:
            yield False, document.text[:cut]
        yield held, document.text[cut:]


def _tidy(text: bytes, cut: int) -> int:
    """The last place up to `cut` that is not inside a UTF-8 character."""
    while cut and cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _batches(parts: Iterator[tuple[bool, bytes]]) -> Iterator[list[tuple[bool, bytes]]]:
    batch: list[tuple[bool, bytes]] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
