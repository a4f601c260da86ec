"""The worker program of `moesys bench a2a`: measures what bench.json in its run's folder asks for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moesys.config.schema import Config
from moesys.files import json_text, read_json, write_json
from moesys.measure.a2a_benchmark import run as benchmark
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.result import CollectiveResult
from moesys.parallel import nodes
from moesys.train import native, worker


def run(config: Config, run_dir: Path) -> None:
    """Measure what run_dir/bench.json asks for; rank 0 writes results.json at the end, and follow.jsonl meanwhile."""
    worker.guarded(_measure, config, run_dir)


def _measure(config: Config, run_dir: Path) -> None:
    mesh = native.connect(config)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, nodes.here(mesh.rank, dist.get_world_size(), config.cluster))
    asked = read_json(run_dir / "bench.json", "run the benchmark again")
    follow = (run_dir / "follow.jsonl").open("w", buffering=1) if mesh.rank == 0 else None

    def tell(result: CollectiveResult) -> None:
        if follow is not None:
            follow.write(json_text(result.as_json()) + "\n")

    results = benchmark.run(config, mesh, BenchmarkOptions(**asked), names, tell)
    if mesh.rank == 0:
        facts = {"hosts": names, "backend": dist.get_backend(), "device": _device(mesh.device), "ranks": len(names)}
        found = {"results": [asdict(result) for result in results], "facts": facts}
        write_json(run_dir / "results.json", found)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
