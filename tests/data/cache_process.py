"""What tests of the cache do in processes of their own, importable by name."""

from __future__ import annotations

import time

from moesys.data import corpus, tokenized
from moesys.data.corpus import open_corpus


def build(config, barrier, results, delay):
    """In a process of its own: open the corpus with slow tokenization, and say how often it tokenized."""
    made, write = [], tokenized.write

    def slowly(*arguments):
        made.append(1)
        time.sleep(delay)
        write(*arguments)

    corpus.tokenized.write = slowly
    barrier.wait(600)
    opened = open_corpus(config)
    results.put((len(made), len(opened.train), int(opened.train[:].sum()), int(opened.heldout[:].sum())))
