"""Loading of a released model beside transformers and beside reading the same bytes.

moesys bench load --layers 1        # Qwen3-30B-A3B's shape, cut to one layer: 2.4 GB in files

All sides are one process; the files are in the page cache, unless memory is short. Weights become float32, as training
has them.
"""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from moesys import leftovers
from moesys.comparisons import other_system
from moesys.config.schema import ModelConfig
from moesys.hub.choose import choose
from moesys.hub.derive import released
from moesys.hub.family import nested
from moesys.hub.fit import Fit, fit
from moesys.hub.mapping import whole
from moesys.hub.weights import ReleasedWeights
from moesys.hub.writer import FolderWriter, Planned
from moesys.measure.interleaved_timing import interleave
from moesys.words import plural, size_text

OURS, THEIRS, INTO, READ = "moesys", "transformers", "into", "read"
BLOCK = 64 * 2**20


@dataclass(frozen=True)
class Result:
    """Medians over interleaved rounds.

    Attributes:
        seconds: by side: "moesys", which also allocates weights, as "transformers" does; "into", moesys into weights
            that were allocated and written before, as a trainer's are; "read", the bytes of all files alone.
        to_transformers: seconds of moesys / of transformers, median of the rounds' ratios.
        of_reading: bytes per second of "into" / of reading alone, the same.
        bytes: of the files.
    """

    seconds: dict[str, float]
    to_transformers: float
    of_reading: float
    bytes: int
    tensors: int
    rounds: int
    shape: str
    machine: str
    date: str

    def lines(self) -> list[str]:
        """The result as text."""
        rate = {side: f"{size_text(self.bytes / seconds)}/s" for side, seconds in self.seconds.items()}
        words = {
            OURS: "moesys, into new float32 weights",
            THEIRS: "transformers' from_pretrained, float32",
            INTO: "moesys, into weights that are there",
            READ: "read alone, into one buffer",
        }
        return [
            f"{self.machine}, {self.date}: {self.shape}, {size_text(self.bytes)} in {plural(self.tensors, 'tensor')}",
            f"  medians of {plural(self.rounds, 'interleaved round')}, one process",
            *(f"  {words[side]:<42} {s:>7.2f} s   {rate[side]}" for side, s in self.seconds.items()),
            f"  moesys / transformers, seconds             {self.to_transformers:>7.2f}   (aim: at most 1.00)",
            f"  moesys / read alone, bytes per second      {self.of_reading:>7.2f}   (aim: at least 0.80)",
        ]

    def as_json(self) -> dict[str, object]:
        """All figures by name."""
        return asdict(self)


def command(arguments: argparse.Namespace) -> Result:
    """Run the comparison that the command line describes.

    Raises:
        NoComparisonError: transformers is not installed.
    """
    other_system("transformers", "bench load")
    with leftovers.temporary("load") as place:
        folder = place / "model"
        write(folder, shape(arguments.layers))
        return compare(folder, arguments.rounds, f"Qwen3-30B-A3B with {plural(arguments.layers, 'layer')}")


def shape(layers: int) -> ModelConfig:
    """Qwen3-30B-A3B (Qwen 2025, arXiv 2505.09388) with fewer layers."""
    attention = {"heads": 32, "kv_heads": 4, "head_dim": 128, "qk_norm": "head"}
    moe = {"experts": 128, "top_k": 8, "ffn_hidden": 768, "balance_loss": 0.001}
    sizes = {"vocab_size": 151936, "hidden": 2048, "layers": layers, "norm_eps": 1e-6, "rope_theta": 1e6}
    return ModelConfig.model_validate(sizes | {"attention": attention, "moe": moe})


def write(folder: Path, model: ModelConfig) -> None:
    """Write random bfloat16 weights of a model to `folder`, in files of 1 GB."""
    family = choose(model, "qwen3_moe")
    assert model.vocab_size is not None
    stored = [s for weight in family.weights(model, model.vocab_size) for s in family.stored(weight, model)]
    planned = [Planned(s.name, s.shape, torch.bfloat16) for s in stored]
    raw = family.write(model) | {"torch_dtype": "bfloat16", "dtype": "bfloat16", "max_position_embeddings": 4096}
    with FolderWriter(folder, planned, 10**9) as writer:
        for tensor in planned:
            writer.add(tensor.name, torch.randn(tensor.shape, dtype=torch.float32).to(torch.bfloat16))
        writer.finish(raw, {}, {})


def compare(folder: Path, rounds: int | None, named: str) -> Result:
    """Load `folder` in turn with each side."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    fitted = _fit(folder)
    there = _load(fitted)
    sides: dict[str, Callable[[], object]] = {
        OURS: lambda: _load(fitted),
        INTO: lambda: _fill(fitted, there),
        THEIRS: lambda: _transformers(folder),
        READ: lambda: [_read(path) for path in files],
    }
    seconds = interleave(sides, rounds, _timed, warmup=1, what="loading")
    return Result(
        {side: median(each) for side, each in seconds.items()},
        median(a / b for a, b in zip(seconds[OURS], seconds[THEIRS], strict=True)),
        median(b / a for a, b in zip(seconds[INTO], seconds[READ], strict=True)),
        size,
        len(fitted.folder.tensors),
        len(seconds[OURS]),
        named,
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        str(date.today()),
    )


def _timed(step: Callable[[], object]) -> float:
    begin = perf_counter()
    made = step()
    seconds = perf_counter() - begin
    del made
    gc.collect()
    return seconds


def _fit(folder: Path) -> Fit:
    found = released(folder)
    model = ModelConfig.model_validate(nested(found.derived.values))
    assert model.vocab_size is not None
    return fit(found.folder, model, model.vocab_size)


def _load(fitted: Fit) -> dict[str, torch.Tensor]:
    """The weights, newly allocated."""
    model = ModelConfig.model_validate(nested(_values(fitted)))
    assert model.vocab_size is not None
    weights = {w.name: torch.empty(w.shape) for w in fitted.family.weights(model, model.vocab_size)}
    _fill(fitted, weights)
    return weights


def _fill(fitted: Fit, weights: dict[str, torch.Tensor]) -> None:
    source = ReleasedWeights(fitted)
    for name, weight in weights.items():
        source.read_into(weight, name, whole(weight.shape))


def _values(fitted: Fit) -> dict[str, Any]:
    return fitted.family.read(fitted.folder.config).values


def _transformers(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _read(path: Path) -> int:
    """Read a file block by block into one buffer; returns its bytes."""
    buffer, total = bytearray(BLOCK), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total
