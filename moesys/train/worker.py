"""The worker program of a run, which every launcher starts on every rank.

    RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 \\
        python -m moesys.train.rank moesys.train.worker runs/NAME
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.data.corpus import Corpus, open_corpus
from moesys.data.ngram import cross_entropies
from moesys.errors import DataError, FileError
from moesys.files import json_objects, read_json, write_json
from moesys.measure.explain.averages import explain
from moesys.measure.explain.step_summary import Summary
from moesys.measure.record.recorder import StepRecorder
from moesys.measure.report import run as report
from moesys.measure.report.facts import TEXTS
from moesys.models.size import parameters
from moesys.parallel.mesh import Ranks
from moesys.train import checkpoint, heartbeat, initial_weights, manifest, resume, run_folder
from moesys.train.balance import sentence
from moesys.train.engine import engine_of
from moesys.train.fill import fill
from moesys.train.loop import Trainer
from moesys.train.metrics import MetricsLog
from moesys.train.rank import LOG_ONLY
from moesys.train.routing_log import RoutingLog
from moesys.train.run_exports import RunExports
from moesys.train.throughput import Throughput


def run(config: Config, run_dir: Path) -> None:
    """Train `config` to its end in `run_dir`, from the newest checkpoint there if there is one."""
    guarded(_train, config, run_dir)


def guarded(work: Callable[[Config, Path], None], config: Config, run_dir: Path) -> None:
    """`work(config, run_dir)`, then leave the process group, unless it fails."""
    work(config, run_dir)
    part()


def part() -> None:
    """Wait for all ranks and leave the process group, unless this rank has left it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def set_deterministic(config: Config) -> None:
    """Use torch's deterministic algorithms if `train.deterministic` says so."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _train(config: Config, run_dir: Path) -> None:
    set_deterministic(config)
    heartbeat.phase("joining the other ranks")
    mesh = engine_of(config).connect(config)
    _write_ranks(mesh, run_dir)
    heartbeat.phase("loading data", shown=True)
    corpus = open_corpus(config)
    agree(corpus)
    heartbeat.phase("building the model", shown=True)
    folder = run_dir / "checkpoints"
    start = None if checkpoint.newest(folder) else initial_weights.find(config)
    trainer = Trainer(config, mesh, corpus, draw=checkpoint.newest(folder) is None and start is None)
    if start is not None:
        _print_start(fill(trainer.engine, start))
    else:
        _print_resumption(trainer.resume(folder), trainer, run_dir)
    if mesh.rank == 0:
        run_folder.accept(run_dir)
    routing = RoutingLog(trainer.engine, run_dir / "routing", trainer.step)
    recorder = StepRecorder(config, mesh, run_dir, trainer.step)
    with MetricsLog(config, run_dir, trainer.step) as log:
        exports = RunExports(config, run_dir, mesh.rank == 0)
        summary = _steps(trainer, log, routing, recorder, folder, exports)
        part()  # the other ranks need not wait for rank 0's last work
        if mesh.rank == 0:
            _write_summary(summary, trainer, run_dir, corpus)  # metrics are served until the end
            if config.output.export != "none":
                heartbeat.phase("exporting the model", shown=True)
                exports.finish(Path(summary["checkpoint"]))


def _print_start(said: str) -> None:
    if dist.get_rank() == 0:
        print(said, flush=True)


def _print_resumption(path: Path | None, trainer: Trainer, run_dir: Path) -> None:
    """Print on rank 0 from which step the run goes on, which records are written again, and what has changed."""
    if dist.get_rank() != 0:
        return
    lines = manifest.incomplete(run_dir / "checkpoints")
    if path is not None and (resumed := trainer.resumed) is not None:
        lines.append(going_on(path, resumed.step, trainer.config.train.steps, run_dir))
        lines += _changed(path, trainer.config, resumed)
        lines += [f"  not in it, thus new: {name}" for name in resumed.fresh]
    if lines:
        print("\n".join(lines), flush=True)


def _changed(path: Path, config: Config, resumed: checkpoint.ResumePoint) -> list[str]:
    """A line for each change since a checkpoint; for the log alone if the launcher has printed it before the start."""
    printed = {change.arrow() for change in resume.changes(manifest.read(path), config)}
    return [
        f"{LOG_ONLY if change.arrow() in printed else ''}{resume.changed_since(resumed.step, change)}"
        for change in resumed.changes
    ]


def going_on(checkpoint: Path, step: int, steps: int, run_dir: Path) -> str:
    """A sentence on the checkpoint from which a run goes on, and on the records that are written again."""
    written = max(
        (r["step"] for r in json_objects(run_dir / "metrics.jsonl") if isinstance(r.get("step"), int)), default=0
    )
    if step >= steps:
        return f"nothing is left to train: {checkpoint} is of step {step} of {steps}"
    again = f"; metrics of steps {step + 1} to {written} are removed and written again" if written > step else ""
    return f"going on from step {step} of {steps}: {checkpoint}{again}"


def agree(corpus: Corpus) -> None:
    """Raise DataError if ranks read different text: a file differs on one node, or the Python version does."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), corpus.fingerprint, corpus.more_fingerprints))
    odd = [f"rank {rank} on {facts[0]}" for rank, facts in enumerate(everyone) if facts[1:] != everyone[0][1:]]
    if odd:
        rule = f"the data of {odd[0]} are not those of rank 0 on {everyone[0][0]}"
        tokens = everyone[0][1]["train_tokens"]
        raise DataError(f"{rule}: {tokens:,} training tokens there; put the same files on every node")


def _steps(
    trainer: Trainer,
    log: MetricsLog,
    routing: RoutingLog,
    recorder: StepRecorder,
    folder: Path,
    exports: RunExports,
) -> dict[str, Any]:
    t, o = trainer.config.train, trainer.config.output
    begin, first = perf_counter(), trainer.step
    pace = Throughput(trainer)
    saved = None
    while trainer.step < t.steps:
        step = trainer.step + 1
        logged = step % o.log_every == 0 or step == t.steps
        evaluates = t.eval_every > 0 and step % t.eval_every == 0 and step < t.steps
        saves = o.checkpoint_every > 0 and step % o.checkpoint_every == 0 and step < t.steps
        heartbeat.step(step)
        with recorder.step(step) as recording:
            record = trainer.train_step(due=logged or evaluates or saves or recording is not None)
        pace.take(record)
        _write_measured(recorder.keep(recording, trainer.load), log)
        routing.write(step)
        if logged:
            eta = (perf_counter() - begin) / (step - first) * (t.steps - step)
            log.write({**record, "steps": t.steps, "eta_s": eta, "time": time()})
        _write_reports(trainer, log, folder)
        if evaluates:
            heartbeat.phase("evaluating on held-out data")
            log.write({"step": step, **_heldout(trainer)})
        if saves:
            _write_measured(recorder.flush(), log)
            heartbeat.phase("saving a checkpoint")
            exports.before_saving()
            saved = trainer.save(folder)
            exports.saved(saved)
    _write_measured(recorder.flush(), log)
    heartbeat.phase("evaluating on held-out data", shown=True)
    heldout = _heldout(trainer)
    if trainer.step > first:
        log.write({"step": trainer.step, **heldout})
        heartbeat.phase("saving the checkpoint", shown=True)
        exports.before_saving()
        saved = trainer.save(folder)
    faults = trainer.balance.faults()
    return {
        **heldout,
        "skipped_steps": trainer.guard.total,
        "routing_faults": [fault.as_json() for fault in faults],
        "routing": sentence(faults) or None,
        "tokens_per_second": pace.tokens_per_second,
        "all_to_all_share": pace.all_to_all_share,
        "checkpoint": str(saved) if saved else None,
        "communication": explanation.headline() if (explanation := recorder.explanation()) else None,
    }


def _write_reports(trainer: Trainer, log: MetricsLog, folder: Path) -> None:
    """Write the load, faults and skips of the steps that were read.

    Raises:
        TrainingError: one of them was skipped too many.
    """
    for report_ in trainer.reports:
        step = report_.measured.step
        log.write_load(step, report_.measured.load)
        if report_.faults:
            log.warn(step, sentence(report_.faults))
        if report_.skip is not None:
            log.warn(step, f"skipped because it is not finite: {report_.skip}")
    trainer.guard.check(checkpoint.newest(folder) if trainer.guard.over else None)


def _heldout(trainer: Trainer) -> dict[str, float]:
    """The loss of every held-out text, per token and, where the text is known, in bits per byte. Collective."""
    found: dict[str, float] = {}
    for name in trainer.evaluation.names():
        text, key = trainer.evaluation.text(name), f"{TEXTS}{name}/" if name else "heldout_"
        found[f"{key}loss"] = text.loss
        if text.bits_per_byte is not None:
            found[f"{key}bits_per_byte"] = text.bits_per_byte
    return found


def _write_measured(steps: Sequence[Summary], log: MetricsLog) -> None:
    """Write the breakdown of recorded steps among the metrics of these steps."""
    for step in steps:
        e = explain([step])
        parts = {f"seconds/{name}": seconds for name, seconds in e.total.parts.items()}
        causes = {f"seconds/all-to-all {name}": seconds for name, seconds in e.causes.parts.items()}
        log.write({"step": step.number, **e.shares, **parts, **causes})


def _write_summary(summary: dict[str, Any], trainer: Trainer, run_dir: Path, corpus: Corpus) -> None:
    heartbeat.phase("counting pairs of tokens for the bigram model", shown=True)
    windows = np.stack([trainer.heldout[n] for n in range(trainer.heldout_windows())])
    unigram, bigram = cross_entropies(corpus.train, windows, corpus.vocab_size)
    total, active = parameters(trainer.config.model, corpus.vocab_size)
    old, config = run_dir / "summary.json", resume.saved_configuration(trainer.config)
    trained = summary["checkpoint"] is not None
    if not trained:
        summary["checkpoint"] = str(checkpoint.newest(run_dir / "checkpoints"))
    summary |= {
        "unigram_loss": unigram,
        "bigram_loss": bigram,
        "heldout_bytes_per_token": trainer.heldout_bytes_per_token,
        "steps": trainer.step,
        "tokens": trainer.seen * trainer.config.train.seq_len,
        "vocab_size": corpus.vocab_size,
        "world_size": trainer.mesh.degrees.world,
        "parameters": total,
        "active_parameters": active,
        "metrics": str(run_dir / "metrics.jsonl"),
    }
    summary["config"] = config
    if not trained:
        summary |= _kept(old)
    summary["profile"] = trainer.config.measure.profile
    heartbeat.phase("writing the report", shown=True)
    summary["report"] = str(report.write(run_dir, summary))
    write_json(old, summary)


OF_TRAINING = ("tokens_per_second", "all_to_all_share", "world_size", "config")
"""Keys of a summary that belong to the run that trained, not to one that found nothing left to train."""


def _kept(path: Path) -> dict[str, Any]:
    """The figures and configuration of the run that trained; empty if its summary is missing or damaged."""
    try:
        before = read_json(path, "")
    except FileError:
        return {}
    return {key: before[key] for key in OF_TRAINING if key in before}


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
