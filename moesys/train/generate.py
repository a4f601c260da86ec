"""`moesys generate`: text from a trained model, as it appears."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from time import perf_counter

import numpy as np
import torch

from moesys.data.text_stream import TextStream
from moesys.data.tokenizers import Tokenizer
from moesys.errors import DataError
from moesys.models.decoder import Decoder
from moesys.models.decoding import decoding, recomputed
from moesys.models.sampling import Sampler
from moesys.train.open_model import OpenedModel, open_model
from moesys.words import plural


def command(arguments: argparse.Namespace) -> int:
    """Print the prompt and what the model writes behind it, and on standard error what it took."""
    prompt = read_prompt(arguments.prompt)
    opened = open_model(arguments.model, chosen_device(arguments.device))
    prompt_T = tokens_of(prompt, opened.tokenizer)
    for line in notes(opened, len(prompt_T) + arguments.tokens):
        print(line, file=sys.stderr, flush=True)
    if not arguments.only_new:
        _show(prompt.decode("utf-8", "replace"))
    sampler = Sampler(arguments.temperature, arguments.top_p, arguments.seed, opened.tokenizer.vocab_size)
    stream, count, begin = TextStream(opened.tokenizer, prompt_T), 0, perf_counter()
    for token in generate(opened.model, prompt_T, sampler, arguments.tokens, opened.tokenizer.end_of_document):
        count += 1
        _show(stream.push(token))
    _show(stream.end() + "\n")
    seconds = perf_counter() - begin
    ended = "" if count == arguments.tokens else ", then the end of the document"
    print(f"{plural(count, 'token')} in {seconds:.1f} s{ended}: {opened.path}", file=sys.stderr)
    return 0


def generate(
    model: Decoder, prompt_T: np.ndarray, sampler: Sampler, most: int, end: int | None = None
) -> Iterator[int]:
    """The tokens that follow a prompt [T], T ≥ 1: `most` of them, or those before the token `end`."""
    device = next(model.parameters()).device
    with decoding(model, len(prompt_T) + most) as decode:
        piece_1S = torch.from_numpy(prompt_T.astype(np.int64))[None].to(device)
        for _ in range(most):
            token_1 = sampler(decode(piece_1S))
            if (token := int(token_1)) == end:
                return
            yield token
            piece_1S = token_1[None]


def read_prompt(given: str) -> bytes:
    """The prompt as UTF-8; of "-" what standard input has."""
    return sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", "surrogateescape")


def tokens_of(prompt: bytes, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a prompt; of an empty one the end of a document, which the next document follows.

    Raises:
        DataError: it is empty, and the tokenizer has no such token.
    """
    found = tokenizer.encode(prompt)
    if len(found):
        return found
    if tokenizer.end_of_document is None:
        rule = "--prompt: is empty, and the tokenizer has no token between documents to begin with"
        raise DataError(f"{rule}\n    remedy: give some text")
    return np.array([tokenizer.end_of_document])


def notes(opened: OpenedModel, length: int) -> Iterator[str]:
    """Lines on what makes a text of `length` tokens slow, or unlike training."""
    if why := recomputed(opened.model.config):
        yield f"each token computes the whole text again: {why}"
    if opened.sequence is not None and length > opened.sequence:
        yield f"the text may have {length} tokens; the model was trained on sequences of {opened.sequence}"


def chosen_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; auto is a GPU if there is one.

    Raises:
        DataError: there is no GPU.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise DataError("--device cuda: this machine has no GPU that torch can use\n    remedy: leave it out")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Pictures of control characters: written to a terminal, such a character may do anything to it."""


def _show(text: str) -> None:
    print(text.translate(SHOWN) if sys.stdout.isatty() else text, end="", flush=True)
