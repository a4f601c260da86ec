"""The sources of text, by `data.kind`. Each is a module with the same three functions.

Megatron's indexed datasets are not among them: they are tokens already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from moesys.config.schema import DataConfig
from moesys.data import huggingface, stdlib, text
from moesys.data.documents import Document
from moesys.errors import Problem


class Source(Protocol):
    """The interface of a source."""

    def check(self, data: DataConfig, /) -> list[Problem]:
        """Problems of the source, as far as they are quick to find; no slow import."""
        ...

    def identity(self, data: DataConfig, /) -> object:
        """JSON that changes when the documents do, found without reading them."""
        ...

    def documents(self, data: DataConfig, /) -> Iterator[Document]:
        """All documents, in the same order on every machine. Raises DataError if one cannot be read."""
        ...


SOURCES: dict[str, Source] = {"python-stdlib": stdlib, "text": text, "huggingface": huggingface}
