"""One worker process of a run: what every launcher starts on every rank.

    RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 \\
        python -m moesys.train.worker runs/NAME
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesys.config.load import load
from moesys.config.schema import Config
from moesys.data.corpus import Corpus, open_corpus
from moesys.data.ngram import cross_entropies
from moesys.errors import DataError, FileError, MoesysError
from moesys.files import read_json, write_json, write_whole
from moesys.measure.explain import explain
from moesys.measure.recorder import Recorder
from moesys.measure.report import run as report
from moesys.measure.step import Step
from moesys.models.size import parameters
from moesys.parallel.mesh import Ranks
from moesys.train.engine import engine_of
from moesys.train.gates import RoutingLog
from moesys.train.loop import Trainer
from moesys.train.metrics import MetricsLog

SAMPLED = 2**20
"""Tokens of each side that ranks compare before they train."""


def run(config: Config, run_dir: Path) -> None:
    """Train `config` to its end in `run_dir`, from the newest checkpoint there if there is one."""
    guarded(_train, config, run_dir)


def guarded(work: Callable[[Config, Path], None], config: Config, run_dir: Path) -> None:
    """`work(config, run_dir)`, then leave the process group.

    Writes errors/rank-N.txt and raises if anything fails.
    """
    rank = int(os.environ.get("RANK", 0))
    errors = run_dir / "errors"
    errors.mkdir(parents=True, exist_ok=True)
    try:
        work(config, run_dir)
    except BaseException as error:
        text = str(error) if isinstance(error, MoesysError) else traceback.format_exc()
        write_whole(errors / f"rank-{rank}.txt", text)
        raise
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.barrier()
            dist.destroy_process_group()


def _train(config: Config, run_dir: Path) -> None:
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    mesh = engine_of(config).connect(config)
    _write_ranks(mesh, run_dir)
    corpus = open_corpus(config)
    _agree(corpus)
    trainer = Trainer(config, mesh, corpus)
    folder = run_dir / "checkpoints"
    trainer.resume(folder)
    routing = RoutingLog(trainer.engine, run_dir / "routing", trainer.step)
    recorder = Recorder(config, mesh, run_dir, trainer.step)
    with MetricsLog(config, run_dir, trainer.step) as log:
        summary = _steps(trainer, log, routing, recorder, folder)
    if dist.get_rank() == 0:
        _write_summary(summary, trainer, run_dir, corpus)


def _agree(corpus: Corpus) -> None:
    """Stop if ranks read different text: a file that differs on one node, or another Python version."""
    parts = (corpus.train, corpus.heldout)
    digest = hashlib.blake2b(b"".join(bytes(part[:SAMPLED]) for part in parts)).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), *map(len, parts), digest))
    odd = [f"rank {rank} on {told[0]}" for rank, told in enumerate(everyone) if told[1:] != everyone[0][1:]]
    if odd:
        rule = f"the data of {odd[0]} are not those of rank 0 on {everyone[0][0]}"
        raise DataError(f"{rule}: {everyone[0][1]:,} training tokens there; put the same files on every node")


def _steps(trainer: Trainer, log: MetricsLog, routing: RoutingLog, recorder: Recorder, folder: Path) -> dict[str, Any]:
    t, o = trainer.config.train, trainer.config.output
    begin, first = perf_counter(), trainer.step
    steady: list[dict[str, Any]] = []
    saved = None
    while trainer.step < t.steps:
        with recorder.step(trainer.step + 1) as recording:
            record = trainer.train_step()
        _write_measured(recorder.keep(recording, trainer.load), log)
        routing.write(trainer.step)
        step, spent = trainer.step, perf_counter() - begin
        if step > first + 1:
            steady.append(record)
        if step % o.log_every == 0 or step == t.steps:
            eta = spent / (step - first) * (t.steps - step)
            log.write({**record, "steps": t.steps, "eta_s": eta, "time": time()})
        log.write_load(step, trainer.load)
        if t.eval_every and step % t.eval_every == 0 and step < t.steps:
            log.write({"step": step, "heldout_loss": trainer.evaluate()})
        if o.checkpoint_every and step % o.checkpoint_every == 0 and step < t.steps:
            _write_measured(recorder.flush(), log)
            saved = trainer.save(folder)
    _write_measured(recorder.flush(), log)
    heldout = trainer.evaluate()
    if trainer.step > first:
        log.write({"step": trainer.step, "heldout_loss": heldout})
        saved = trainer.save(folder)
    seconds = sum(r["step_seconds"] for r in steady)
    tokens = t.global_batch * t.seq_len * len(steady)
    shares = [r["all_to_all_share"] * r["step_seconds"] for r in steady]
    return {
        "heldout_loss": heldout,
        "tokens_per_second": tokens / seconds if seconds else None,
        "all_to_all_share": sum(shares) / seconds if seconds else None,
        "checkpoint": str(saved) if saved else None,
        "communication": explanation.headline() if (explanation := recorder.explanation()) else None,
    }


def _write_measured(steps: Sequence[Step], log: MetricsLog) -> None:
    """What recorded steps say, among the metrics of these steps."""
    for step in steps:
        e = explain([step])
        parts = {f"seconds/{name}": seconds for name, seconds in e.total.parts.items()}
        causes = {f"seconds/all-to-all {name}": seconds for name, seconds in e.causes.parts.items()}
        log.write({"step": step.number, **e.shares, **parts, **causes})


def _write_summary(summary: dict[str, Any], trainer: Trainer, run_dir: Path, corpus: Corpus) -> None:
    windows = np.stack([trainer.heldout[n] for n in range(trainer.heldout_windows())])
    unigram, bigram = cross_entropies(corpus.train, windows, corpus.vocab_size)
    total, active = parameters(trainer.config.model, corpus.vocab_size)
    old = run_dir / "summary.json"
    if summary["tokens_per_second"] is None and old.exists():
        # Nothing was left to train: the figures of the run that did the work stay.
        kept = _readable(old)
        summary |= {k: kept.get(k) for k in ("tokens_per_second", "all_to_all_share", "checkpoint")}
    summary |= {
        "unigram_loss": unigram,
        "bigram_loss": bigram,
        "steps": trainer.step,
        "vocab_size": corpus.vocab_size,
        "world_size": dist.get_world_size(),
        "parameters": total,
        "active_parameters": active,
        "metrics": str(run_dir / "metrics.jsonl"),
    }
    summary["profile"] = trainer.config.measure.profile
    summary["report"] = str(report.write(run_dir, summary))
    write_json(old, summary)


def _readable(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if it is damaged: the file is about to be replaced."""
    try:
        return read_json(path, "")
    except FileError:
        return {}


def _write_ranks(mesh: Ranks, run_dir: Path) -> None:
    host = socket.gethostname()
    here = {
        "rank": mesh.rank,
        "host": host,
        "node_ip": os.environ.get("MOESYS_NODE_IP", host),
        "pid": os.getpid(),
        "local_rank": int(os.environ.get("LOCAL_RANK", 0)),
        "device": torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu",
        **{axis: place for axis, place in (mesh.place | mesh.expert_place).items()},
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, here)
    if mesh.rank == 0:
        write_json(run_dir / "ranks.json", everyone)


def main(work: Callable[[Config, Path], None] = run) -> int:
    """Run the folder named on the command line; 0, or the error's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    run_dir = Path(sys.argv[1])
    try:
        work(load(run_dir / "config.yaml").config, run_dir)
    except Exception as error:
        # `guarded` wrote the whole error to a file, which the launcher shows for the rank that failed first.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"rank {os.environ.get('RANK', 0)} failed: {first_line}", file=sys.stderr)
        return error.exit_code if isinstance(error, MoesysError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
