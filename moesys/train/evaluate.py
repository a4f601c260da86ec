"""The worker program of `moesys eval`: losses of the texts that eval.json in its folder names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesys.config.schema import Config
from moesys.data.corpus import open_corpus, open_texts
from moesys.files import read_json, write_json
from moesys.train import heartbeat, initial_weights, manifest, worker
from moesys.train.engine import engine_of, prepare_gates
from moesys.train.evaluation import Evaluation, TextLoss
from moesys.train.fill import fill


def run(config: Config, folder: Path) -> None:
    """Evaluate the weights that `train.init` names; rank 0 writes results.json."""
    worker.guarded(_evaluate, config, folder)


def _evaluate(config: Config, folder: Path) -> None:
    asked = read_json(folder / "eval.json", "start the command again")
    worker.set_deterministic(config)
    heartbeat.phase("joining the other ranks")
    mesh = engine_of(config).connect(config)
    heartbeat.phase("loading data", shown=True)
    corpus = open_corpus(config) if asked["own"] else open_texts(config)
    worker.agree(corpus)
    heartbeat.phase("loading weights", shown=True)
    start = initial_weights.find(config)
    assert start is not None
    engine = engine_of(config).build(config, mesh, corpus.vocab_size, draw=False)
    prepare_gates(engine, corpus)
    fill(engine, start)
    evaluation, found = Evaluation(engine, corpus), dict[str, Any]()
    for name in evaluation.names():
        heartbeat.phase(f"evaluating {name or 'the held-out data'}", shown=True)
        found[name] = _figures(evaluation.text(name, asked["every"]))
    if mesh.rank == 0:
        saved = {} if start.released is not None else manifest.read(start.path).data
        same = saved == corpus.fingerprint if saved else None
        facts = {"texts": found, "same_data": same, "world_size": mesh.degrees.world}
        write_json(folder / "results.json", facts)


def _figures(text: TextLoss) -> dict[str, Any]:
    return {
        "loss": text.loss,
        "perplexity": text.perplexity,
        "bits_per_byte": text.bits_per_byte,
        "sequences": text.sequences,
        "tokens": text.sequences * text.seq_len,
    }
