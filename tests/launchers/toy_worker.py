"""A stand-in for the trainer: a worker that is quick to start, keeps the runtime contract, and can misbehave.

`python toy_worker.py RUN_DIR` for the local launcher, `toy_worker:run` for Ray. What it does is in the
environment variable MOESYS_TOY: "ok", "fail" (rank 1 raises a DataError), "wait" (until killed),
"stubborn" (the same, deaf to SIGTERM). MOESYS_TOY_TIMEOUT: seconds that its steps wait for other ranks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from moesys.errors import DataError
from moesys.train import heartbeat, rank

SHOWN = (
    "OMP_NUM_THREADS",
    "NCCL_DEBUG",
    "GLOO_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
    "FROM_LAUNCH_ENV",
    "MOESYS_NODE_IP",
    "UNRELATED",
    "HF_TOKEN",
)
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(config: Any, run_dir: Path) -> None:
    """Write what this worker saw, take part in collectives, then do what MOESYS_TOY says."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen: dict[str, Any] = {key: os.environ.get(key) for key in SHOWN + RANKS}
    seen |= {"pid": os.getpid(), "cwd": os.getcwd(), "time": time.time(), "host": socket.gethostname()}
    seen |= {"steps": config and config.train.steps, "node": ray_node(), "path": config and config.data.path}
    write(run_dir / "seen" / f"{rank}.json", seen)
    print(f"hello from rank {rank}", flush=True)
    barrier = gloo_barrier()
    barrier()
    if rank == 0:
        everyone = [json.loads((run_dir / "seen" / f"{r}.json").read_text()) for r in range(world)]
        write(run_dir / "ranks.json", [{"rank": r, "pid": e["pid"], "host": e["host"]} for r, e in enumerate(everyone)])
    behave(os.environ.get("MOESYS_TOY", "ok"), rank, barrier, run_dir)


def behave(mode: str, rank: int, barrier: Callable[[], None], run_dir: Path) -> None:
    """Fail, wait or take five steps and write a summary."""
    if mode == "fail" and rank == 1:
        raise DataError("the corpus is empty")
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    steps = 5 if mode == "ok" else 10**6
    for step in range(1, steps + 1):
        heartbeat.step(step)
        barrier()
        time.sleep(0.02)
        if rank == 0:
            line = {"step": step, "steps": steps, "loss": 5.0 / step, "tokens_per_second": 1234.5, "eta_s": 65.0}
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    if rank == 0:
        write(run_dir / "summary.json", {"heldout_loss": 1.25, "unigram_loss": 3.5, "steps": 5})


def write(path: Path, value: object) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


def gloo_barrier() -> Callable[[], None]:
    """A collective over all workers, which join their process group."""
    import torch.distributed as dist

    from moesys.parallel.rendezvous import join

    join("cpu", timedelta(seconds=600))
    if (seconds := os.environ.get("MOESYS_TOY_TIMEOUT")) is None:
        return dist.barrier
    heartbeat.set_interval(heartbeat.interval(float(seconds)))
    group = dist.new_group(timeout=timedelta(seconds=float(seconds)))
    return lambda: dist.barrier(group)


def ray_node() -> str | None:
    """The Ray node of this process, if it is one of Ray's."""
    if "ray" not in sys.modules:
        return None
    import ray

    return ray.get_runtime_context().get_node_id()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rank.leave(rank.process(lambda: run(None, folder), folder))
