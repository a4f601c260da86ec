"""Text that appears token by token, in whole characters."""

from __future__ import annotations

import codecs

import numpy as np

from moesys.data.tokenizers import Tokenizer

REPLACED = "\ufffd".encode()
"""The character that the package `tokenizers` gives for bytes that are no whole character (yet)."""
LONGEST = 4
"""Bytes, and thus tokens, of one character at most."""


class TextStream:
    """Decodes tokens one by one, and gives the text that they add.

    A character of several bytes may be spread over tokens: it comes with the last of them. A tokenizer may treat the
    first word of a text otherwise than later ones: so tokens are decoded behind those before.

    Args:
        tokenizer: of the tokens.
        before: tokens [T] of the text so far, which is not given again.
    """

    def __init__(self, tokenizer: Tokenizer, before: np.ndarray | None = None):
        self._tokenizer = tokenizer
        self._tokens = [] if before is None else [int(token) for token in before]
        self._given = len(self._tokens)
        """Tokens, from the first kept one, whose text was given."""
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete with this token; "" while a character is not."""
        self._tokens.append(token)
        complete = not self._decode(len(self._tokens)).endswith(REPLACED)
        if not complete and len(self._tokens) - self._given < LONGEST:
            return ""
        # Bytes that so many tokens did not complete are no character; the next ones may still be.
        return self._characters.decode(self._give(len(self._tokens) if complete else self._given + 1))

    def end(self) -> str:
        """The rest: what no token completed, with U+FFFD in the place of bytes that are no character."""
        return self._characters.decode(self._give(len(self._tokens)), final=True)

    def _give(self, count: int) -> bytes:
        """The text of the first `count` tokens without what was given; the tokens before that are forgotten."""
        added = self._decode(count)[len(self._decode(self._given)) :]
        self._tokens, self._given = self._tokens[self._given :], count - self._given
        return added

    def _decode(self, count: int) -> bytes:
        return self._tokenizer.decode(np.array(self._tokens[:count], np.int64))
