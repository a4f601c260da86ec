"""Tokenizers: bytes, or a Hugging Face tokenizer.json file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moesys.config.schema import DataConfig
from moesys.data.documents import absent, located, parse, read
from moesys.errors import DataError, Problem

END_OF_DOCUMENT = (
    "<|endoftext|>",  # GPT-2, GPT-NeoX, OLMo, Qwen, GPT-OSS
    "<|end_of_text|>",  # Llama 3
    "</s>",  # Llama 2, Mistral, Mixtral, T5
    "<｜end▁of▁sentence｜>",  # DeepSeek-V2, -V3
    "<eos>",  # Gemma
    "[EOS]",
    "<EOS>",
    "[SEP]",  # BERT
)
"""Names of the token that ends a document; the first one that a tokenizer has is used."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    `vocab_size`: ids are below it. `end_of_document`: the id that follows each document; None if the vocabulary has
    none, so that documents follow each other directly. `identity`: differs between tokenizers that encode differently.
    """

    @property
    def vocab_size(self) -> int:
        """A number that all ids are below."""

    @property
    def end_of_document(self) -> int | None:
        """The id that follows each document, or None."""

    @property
    def identity(self) -> str:
        """A text that differs between tokenizers that encode differently."""

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids [T] of `text`, in the smallest unsigned type that holds `vocab_size` ids."""
        ...

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text; faster where the tokenizer has threads."""
        ...

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of token ids [T]."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds ids below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1)


class ByteTokenizer:
    """One token per byte, and 256 between documents: any file, any language, nothing to train."""

    vocab_size = 257
    end_of_document = 256
    identity = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [bytes]."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes; ends of documents have none."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes()


class BrokenTokenizer(DataError):
    """A tokenizer file with mistakes that the package itself notices too late."""


class HFTokenizer:
    """A tokenizer.json file, by the package `tokenizers`.

    No special tokens are added around a text, and the file's own truncation and padding, meant for
    batches of a model's input, are off. Bytes that are not UTF-8 become U+FFFD. `content`: the file's bytes.

    Raises:
        DataError: the package is missing, or the file is not a tokenizer.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content = read(path)
        self.vocab_size = max(_ids(path)) + 1

    @property
    def identity(self) -> str:
        """A digest of the file."""
        return blake2b(self.content, digest_size=16).hexdigest()

    @property
    def end_of_document(self) -> int | None:
        """The id of the first of `END_OF_DOCUMENT` that the vocabulary has, or None."""
        ids = (self._tokenizer.token_to_id(name) for name in END_OF_DOCUMENT)
        return next((number for number in ids if number is not None), None)

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids [T]."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of each text; the package encodes them in threads."""
        strings = [text.decode("utf-8", "replace") for text in texts]
        tokenizer = self._tokenizer
        encodings = self._sound(lambda: tokenizer.encode_batch_fast(strings, add_special_tokens=False))
        return [np.asarray(encoding.ids, token_dtype(self.vocab_size)) for encoding in encodings]

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text as UTF-8, special tokens by their names."""
        ids, tokenizer = np.asarray(tokens).tolist(), self._tokenizer
        return self._sound(lambda: tokenizer.decode(ids, skip_special_tokens=False)).encode()

    def probe(self) -> None:
        """Encode a few characters, so that a broken file is found before anything starts.

        Raises:
            BrokenTokenizer: the package breaks off. A word that is not in the vocabulary is no fault.
        """
        try:
            self.encode("a 1\n日".encode())
        except BrokenTokenizer:
            raise
        except DataError:
            return

    def _sound(self, call: Callable[[], Any]) -> Any:
        """The result of `call` of the package.

        Raises:
            DataError: it raised a bare Exception, as it does for wrong files, or its Rust code panicked with a
                BaseException of a class that cannot be imported.
        """
        try:
            return call()
        except Exception as error:
            raise DataError(f"{self.path} is not a tokenizer of the package tokenizers: {error}") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise BrokenTokenizer(f"{self.path}: the package tokenizers breaks off on this file: {error}") from None

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer as Rust
        except ImportError:
            raise DataError(f"data.tokenizer {self.path} {NO_PACKAGE}; {INSTALL}") from None
        tokenizer = self._sound(lambda: Rust.from_file(str(self.path)))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


MOST_IDS = 2**24
"""A number above any vocabulary, since models have an embedding with as many rows."""
NO_PACKAGE = "needs the package tokenizers, which is not installed"
INSTALL = "pip install tokenizers, or set data.tokenizer to bytes"


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        DataError: it is missing or broken.
    """
    return ByteTokenizer() if data.tokenizer == "bytes" else HFTokenizer(located(data.tokenizer))


def check(data: DataConfig) -> list[Problem]:
    """Problems if the tokenizer cannot be used; the file is read whole."""
    if data.tokenizer == "bytes":
        return []
    key = "data.tokenizer"
    path = located(data.tokenizer)
    if (rule := absent(path)) is not None:
        remedy = "give bytes, or the path of a tokenizer.json file, relative to the working directory"
        return [Problem(key, rule, remedy)]
    if path.is_dir():
        inside = path / "tokenizer.json"
        remedy = f"name {inside}" if inside.is_file() else "give bytes, or the path of a tokenizer.json file"
        return [Problem(key, "must be a file, and is a folder", remedy)]
    if not path.is_file():
        return [Problem(key, "must be a regular file", "give bytes, or the path of a tokenizer.json file")]
    if importlib.util.find_spec("tokenizers") is None:
        return [Problem(key, NO_PACKAGE, INSTALL)]
    try:
        tokenizer = HFTokenizer(path)
        _ = tokenizer.end_of_document
        tokenizer.probe()
    except DataError as error:
        remedy = "give bytes, or the tokenizer.json file of a fast Hugging Face tokenizer"
        return [Problem(key, str(error), remedy)]
    return []


def _ids(path: Path) -> list[int]:
    """All token ids of a tokenizer.json; they may have gaps, so their number alone does not bound them."""
    content = parse(read(path), f"{path} is")
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not vocabulary or not isinstance(vocabulary, (dict, list)):
        raise DataError(f"{path} is not a tokenizer.json: it has no model with a vocabulary")
    own = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # unigram: a list
    try:
        ids = [*own, *(token["id"] for token in content.get("added_tokens") or ())]
    except (KeyError, TypeError):
        raise DataError(f"{path} is not a tokenizer.json: its added_tokens are not a list of tokens with ids") from None
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise DataError(f"{path} is not a tokenizer.json: its vocabulary has ids that are not integers")
    if not 0 <= min(ids) <= max(ids) < MOST_IDS:
        rule = f"has ids from {min(ids)} to {max(ids)}, and they must be from 0 to {MOST_IDS - 1}"
        raise DataError(f"{path} is not a tokenizer.json: its vocabulary {rule}")
    return ids
