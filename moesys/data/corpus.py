"""The tokens of a run, from any source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np

from moesys.config.schema import Config, DataConfig
from moesys.data import cache, megatron_indexed, tokenized
from moesys.data.documents import located
from moesys.data.sources import SOURCES
from moesys.data.tokenizers import Tokenizer, build_tokenizer, token_dtype
from moesys.data.tokens import Tokens
from moesys.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """A held-out text: its tokens [T], and whether they are those of the run's tokenizer.

    A file of another tool may hold tokens of any tokenizer.
    """

    tokens: Tokens
    tokenized: bool = True


@dataclass(frozen=True)
class Corpus:
    """Tokens for training and held-out tokens, each [T]; ids are below `vocab_size`.

    `tokenized`: True if the tokens are the tokenizer's, see `HeldOut`. `more`: other held-out texts by name.
    """

    train: Tokens
    heldout: Tokens
    tokenizer: Tokenizer
    vocab_size: int
    tokenized: bool = True
    more: Mapping[str, HeldOut] = field(default_factory=dict)

    def bytes_per_token(self, pieces: Iterable[np.ndarray], tokenized: bool | None = None) -> float | None:
        """Bytes of UTF-8 text / tokens in `pieces`, each [T]; None unless the tokens are the tokenizer's.

        The end of a document is a token without bytes. `tokenized`: of a text of `more`.
        """
        if not (self.tokenized if tokenized is None else tokenized):
            return None
        size = count = 0
        for tokens in pieces:
            size += len(self.tokenizer.decode(tokens[tokens != self.tokenizer.end_of_document]))
            count += len(tokens)
        return size / count if size else None

    def frequencies(self) -> np.ndarray:
        """Occurrences of each id in the training data, or in a part of large data: int64 [V]."""
        pieces = [np.asarray(self.train[:])]
        if len(self.train) > COUNTED:
            size = COUNTED // COUNTED_PIECES
            starts = (i * len(self.train) // COUNTED_PIECES for i in range(COUNTED_PIECES))
            pieces = [self.train[start : start + size] for start in starts]
        return np.sum([np.bincount(piece, minlength=self.vocab_size) for piece in pieces], axis=0)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """train_tokens, heldout_tokens, and a digest of the tokens; a part of them represents a long text."""
        sizes = {"train_tokens": len(self.train), "heldout_tokens": len(self.heldout)}
        return sizes | {"digest": _digest(self.train, self.heldout)}

    @cached_property
    def more_fingerprints(self) -> dict[str, str]:
        """A digest of each of the other held-out texts."""
        return {name: _digest(text.tokens) for name, text in self.more.items()}


def _digest(*texts: Tokens) -> str:
    digest = blake2b(digest_size=16)
    for tokens in texts:
        begins = np.linspace(0, max(0, len(tokens) - PIECE), PIECES, dtype=np.int64)
        for begin in np.unique(begins).tolist():
            digest.update(tokens[begin : begin + PIECE].tobytes())
    return digest.hexdigest()


COUNTED, COUNTED_PIECES = 2**24, 64
"""Most tokens that frequencies are counted in, and from how many places of the training data they come."""

PIECE, PIECES = 1 << 17, 64
"""Tokens of one piece that the fingerprint sees, and pieces of each side, evenly spaced."""


def vocab_size(config: Config) -> int:
    """Entries of the embedding: `model.vocab_size`, or else the tokenizer's. Reads no data.

    The tokenizer's are rounded up to a multiple of 64, so that the embedding splits over tensor ranks
    and data shards, and matrix products over it are aligned (as Megatron-LM pads its vocabulary).

    Raises:
        DataError: the tokenizer is needed and missing or broken.
    """
    return config.model.vocab_size or -(-build_tokenizer(config.data).vocab_size // 64) * 64


def open_corpus(config: Config) -> Corpus:
    """The corpus of a run. Every process calls this; one per machine tokenizes, into `data.cache`.

    Raises:
        DataError: the data cannot be read, or are too small for one sequence on either side.
    """
    data, tokenizer = config.data, build_tokenizer(config.data)
    vocabulary = vocab_size(config)
    train: Tokens
    heldout: Tokens
    if data.kind == "megatron":
        train, heldout = megatron_indexed.open_tokens(data, vocabulary)
    else:
        if vocabulary < tokenizer.vocab_size:
            raise DataError(f"model.vocab_size {vocabulary} is below the tokenizer's {tokenizer.vocab_size}")
        train, heldout = _tokenized(data, tokenizer)
    for side, tokens in (("training", train), ("held-out", heldout)):
        if (rule := too_small(side, len(tokens), config)) is not None:
            raise DataError(f"{data.path or data.kind}: {rule}; {TOO_SMALL_REMEDY}")
    more = {name: _whole(name, config, tokenizer, vocabulary) for name in config.train.eval}
    return Corpus(train, heldout, tokenizer, vocabulary, _is_tokenized(data), more)


def open_texts(config: Config) -> Corpus:
    """The texts of `train.eval` alone, without the run's data, which need not be there.

    Raises:
        DataError: as `open_corpus`.
    """
    tokenizer, vocabulary, none = build_tokenizer(config.data), vocab_size(config), np.empty(0, np.uint16)
    if vocabulary < tokenizer.vocab_size:
        raise DataError(f"model.vocab_size {vocabulary} is below the tokenizer's {tokenizer.vocab_size}")
    more = {name: _whole(name, config, tokenizer, vocabulary) for name in config.train.eval}
    return Corpus(none, none, tokenizer, vocabulary, more=more)


def _is_tokenized(data: DataConfig) -> bool:
    return data.kind != "megatron" or data.tokenizer != "bytes"


def source_of(config: Config, name: str) -> DataConfig:
    """The keys of `data` of the held-out text `name` of `train.eval`."""
    return config.data.model_copy(update=config.train.eval[name].model_dump())


def _whole(name: str, config: Config, tokenizer: Tokenizer, vocabulary: int) -> HeldOut:
    """A text of `train.eval`, held out as a whole. Raises DataError as `open_corpus`."""
    data = source_of(config, name)
    tokens: Tokens
    if data.kind == "megatron":
        tokens = megatron_indexed.open_whole(data, vocabulary)
    else:
        _, tokens = _tokenized(data, tokenizer, whole=True)
    if (rule := too_small("held-out", len(tokens), config)) is not None:
        raise DataError(f"train.eval.{name}: {data.path or data.kind}: {rule}; use more text, a shorter train.seq_len")
    return HeldOut(tokens, _is_tokenized(data))


TOO_SMALL_REMEDY = "use more text, a shorter train.seq_len, or another data.heldout"


def too_small(side: str, tokens: int, config: Config) -> str | None:
    """The rule that is broken if `tokens` are fewer than one sequence; None if they are enough."""
    needed = config.train.seq_len + 1
    if tokens >= needed:
        return None
    return f"{tokens} {side} tokens are fewer than one sequence: train.seq_len({needed - 1}) + 1 = {needed}"


def _tokenized(data: DataConfig, tokenizer: Tokenizer, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tokens for training and held-out tokens; `whole`: all are held out."""
    source, share = SOURCES[data.kind], None if whole else data.heldout
    facts = [data.kind, source.identity(data), tokenizer.identity, share]
    folder = located(data.cache) if data.cache else cache.default_folder()
    write = partial(tokenized.write, partial(source.documents, data), tokenizer, share)
    return cache.open_or_make(folder, cache.key(facts), token_dtype(tokenizer.vocab_size), write)
