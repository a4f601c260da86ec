"""Configurations and files for the tests of the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesys.config.schema import Config, DataConfig, ModelConfig, TrainConfig


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """A configuration with keys of `data`, and of the model and training by name; the cache is its own."""

    def make(seq_len: int = 8, vocab_size: int | None = None, **data: Any) -> Config:
        data.setdefault("cache", str(tmp_path / "cache"))
        return Config(
            model=ModelConfig(hidden=8, layers=1, vocab_size=vocab_size),
            train=TrainConfig(seq_len=seq_len),
            data=DataConfig(**{key: str(v) if isinstance(v, Path) else v for key, v in data.items()}),
        )

    return make


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of 60 text files in two levels, of different sizes."""
    folder = tmp_path / "library"
    for number in range(60):
        path = folder / f"shelf{number % 3}" / f"book{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Book {number}: größer als {'x' * (number % 7)}\n" * (20 + number % 5))
    return folder


@pytest.fixture
def write_lines() -> Callable[..., Path]:
    """Write records as a .jsonl file."""

    def write(path: Path, *records: object) -> Path:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 256 bytes and a few pairs, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the mixture of experts, and the gate of the mixture"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
