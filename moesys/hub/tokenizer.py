"""Tokenizer files of a released folder. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesys.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer
from moesys.files import json_text

BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files that may lie beside tokenizer.json."""
END = "<|endoftext|>"


def files(tokenizer: Tokenizer, beside: Path | None = None) -> dict[str, bytes]:
    """The tokenizer's files by their names.

    Args:
        beside: the folder of the released model that the run started from: its other files belong to the tokenizer if
            tokenizer.json is the same there.
    """
    own = isinstance(tokenizer, HFTokenizer)
    content = tokenizer.content if isinstance(tokenizer, HFTokenizer) else json_text(_bytes()).encode()
    found = {"tokenizer.json": content}
    if beside is not None and own and _read(beside / "tokenizer.json") == content:
        found |= {name: text for name in BESIDE if (text := _read(beside / name)) is not None}
    if "tokenizer_config.json" not in found:
        found["tokenizer_config.json"] = json_text(_config(tokenizer), indent=2).encode()
    return found


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, ByteTokenizer):
        return config | {"eos_token": END}
    end = tokenizer.end_of_document
    return config if end is None else config | {"eos_token": tokenizer.decode(_one(end)).decode("utf-8", "replace")}


def _one(token: int) -> Any:
    import numpy as np

    return np.asarray([token])


def _bytes() -> dict[str, Any]:
    """`ByteTokenizer` as a tokenizer.json: the id of a byte is its value, and 256 ends a document."""
    vocab = {letter: byte for byte, letter in enumerate(_letters())}
    end = {"id": 256, "content": END, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "vocab": vocab, "merges": []},
    }


def _letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's byte-level tokenizers: itself if it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = (byte for byte in range(256) if byte not in seen)
    letters = {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]
