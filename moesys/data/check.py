"""Checks the data before anything starts, as far as that is quick.

Slow packages are looked for, not imported, and text is not read to its end. Later faults (in the seventeenth line of a
.jsonl file, for example) raise DataError when the corpus is opened.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesys.config.schema import Config
from moesys.data import megatron_indexed, stdlib, text, tokenizers
from moesys.data.corpus import TOO_SMALL_REMEDY, source_of, too_small
from moesys.data.division import divide, hashed_names
from moesys.data.sources import SOURCES
from moesys.errors import Problem
from moesys.words import plural


def check(config: Config) -> list[Problem]:
    """Problems of the section `data`, and of its combination with the model and the sequence length."""
    data = config.data
    source = megatron_indexed.check(data) if data.kind == "megatron" else SOURCES[data.kind].check(data)
    tokenizer = tokenizers.check(data)
    problems = source + tokenizer
    if not tokenizer:
        problems += _vocabulary(config)
    if not source:
        problems += _size(config)
    for name in config.train.eval:
        problems += _held_out(config, name)
    return problems


def check_texts(config: Config) -> list[Problem]:
    """Problems of the texts of `train.eval` alone, and of the tokenizer."""
    tokenizer = tokenizers.check(config.data)
    problems = [problem for name in config.train.eval for problem in _held_out(config, name)]
    return [*tokenizer, *([] if tokenizer else _vocabulary(config)), *problems]


def _held_out(config: Config, name: str) -> list[Problem]:
    """Problems of a text of `train.eval`, by its own keys."""
    data = source_of(config, name)
    found = megatron_indexed.check(data) if data.kind == "megatron" else SOURCES[data.kind].check(data)
    return [replace(problem, key=f"train.eval.{name}.{problem.key.removeprefix('data.')}") for problem in found]


def _vocabulary(config: Config) -> list[Problem]:
    """Problems of a vocabulary below the tokenizer's. Ids of Megatron's data are checked when they are read."""
    given = config.model.vocab_size
    if given is None or config.data.kind == "megatron":
        return []
    needed = tokenizers.build_tokenizer(config.data).vocab_size
    if given >= needed:
        return []
    rule = f"must be at least the vocabulary of data.tokenizer({config.data.tokenizer}) = {needed}"
    return [Problem("model.vocab_size", rule, f"set it to {needed} or more, or leave it out")]


def _size(config: Config) -> list[Problem]:
    """Problems if a side has less than one sequence, as far as that is known without reading the text."""
    data, needed = config.data, config.train.seq_len + 1
    if data.kind == "megatron":
        return _least(megatron_indexed.count_tokens(data), needed)
    if data.kind == "huggingface" or data.tokenizer != "bytes":
        return []
    files = [file for file in (stdlib if data.kind == "python-stdlib" else text).listing(data) if file.size]
    sizes = np.array([file.size for file in files]) + 1  # one more for the document's end
    if any(file.name.endswith(".jsonl") for file in files):
        return _least(int(sizes.sum()), needed)  # the text of a line is no longer than the line
    division = divide(sizes - 1, hashed_names((file.name for file in files), data.heldout), data.heldout)
    # A cut file gets a second end, and is cut between characters.
    slack = 4 if division.cut else 0
    for side, tokens in zip(("training", "held-out"), division.totals(sizes), strict=True):
        if tokens + slack < needed and (rule := too_small(side, tokens, config)) is not None:
            return [Problem("data.path", rule, TOO_SMALL_REMEDY)]
    return []


def _least(tokens: int, needed: int) -> list[Problem]:
    if tokens >= 2 * needed:
        return []
    rule = f"holds at most {plural(tokens, 'token')}, fewer than one sequence for training and one held out"
    arithmetic = f"2 · (train.seq_len({needed - 1}) + 1) = {2 * needed}"
    return [Problem("data.path", f"{rule}: {arithmetic}", TOO_SMALL_REMEDY)]
