"""Text appears in whole characters, and all of it: joined it is what the tokens decode to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesys.data.text_stream import TextStream
from moesys.data.tokenizers import ByteTokenizer, HFTokenizer


def pieces(stream: TextStream, tokens) -> list[str]:
    return [*(stream.push(int(token)) for token in tokens), stream.end()]


def test_a_character_comes_with_its_last_byte():
    assert pieces(TextStream(ByteTokenizer()), "aé🙂b".encode()) == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_bytes_that_are_no_character_are_replaced_and_those_after_them_are_not():
    found = pieces(TextStream(ByteTokenizer()), b"\xff\xe2\x82x\x80\x80\x80\xe4\xbd\xa0 \xe2\x82")
    assert "".join(found) == "�" + "�x" + "���你 " + "�"
    assert found[-1] == "�", "what ends unfinished comes at the end"


@given(st.binary(max_size=40))
def test_any_bytes_are_shown_as_python_decodes_them(data):
    assert "".join(pieces(TextStream(ByteTokenizer()), data)) == data.decode("utf-8", "replace")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=20), st.text(max_size=10))
def test_a_tokenizers_text_is_whole_behind_what_was_there(tokenizer_file, text, before):
    tokenizer = HFTokenizer(tokenizer_file)
    tokens, start = tokenizer.encode(text.encode()), tokenizer.encode(before.encode())
    found = pieces(TextStream(tokenizer, start), tokens)
    assert "".join(found) == text
    assert all("�" not in piece for piece in found) or "�" in text


def test_words_keep_the_space_that_a_tokenizer_drops_at_the_beginning(tmp_path):
    """SentencePiece's decoders drop the first space of a text: a token alone would lose the one before its word."""
    from tokenizers import Tokenizer, decoders, models

    words = {"<unk>": 0, "▁one": 1, "▁two": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "▁": 6, "</s>": 7}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<unk>"))
    sequence = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(sequence)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    found = pieces(TextStream(HFTokenizer(path), np.array([1])), [2, 3, 4, 5, 1, 6, 2])
    assert found == [" two", "", "", "€", " one", " ", " two", ""]
    lost = pieces(TextStream(HFTokenizer(path), np.array([1])), [3, 4, 2])
    assert "".join(lost) == "�� two"


@pytest.mark.parametrize("before", [None, np.array([], np.int64)])
def test_nothing_gives_nothing(before):
    assert pieces(TextStream(ByteTokenizer(), before), []) == [""]
