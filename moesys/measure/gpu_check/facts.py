"""Reports the device, and the versions of all software that decides what runs on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from moesys.measure.checkout import ROOT
from moesys.measure.gpu_check.rows import CheckTask, Figures, Row, tried
from moesys.version import __version__
from moesys.words import plural

PACKAGES = ("triton", "transformers", "pytest", "hypothesis", "numpy")


def run(task: CheckTask) -> Iterator[Row]:
    """A row for the device, and one for the software."""
    yield tried(device, task, "device")
    yield tried(software, task, "software")


def device(task: CheckTask, what: str) -> Row:
    """The GPU, or the CPU of a dry run."""
    if task.dry:
        name = f"{platform.machine()} CPU"
        said = f"no GPU is used; {name}, {plural(os.cpu_count() or 1, 'core')}"
        return Row(what, "not run", said, {"name": name})
    p = torch.cuda.get_device_properties(0)
    figures: Figures = {
        "name": p.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        **_driver(),
    }
    said = f"{p.name}, capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
    said += f"{p.total_memory / 2**30:.1f} GiB"
    said += "".join(f", {name} {figures[name]}" for name in ("driver", "clock", "power") if name in figures)
    return Row(what, "passed", said, figures)


def _driver() -> Figures:
    """Facts of nvidia-smi on the first visible GPU; empty without nvidia-smi."""
    asked = {"driver": "driver_version", "clock": "clocks.max.sm", "power": "power.limit"}
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    command = [tool, f"--query-gpu=uuid,{','.join(asked.values())}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    for line in done.stdout.splitlines():
        first, *values = (value.strip() for value in line.split(","))
        if uuid in first and len(values) == len(asked):
            return dict(zip(asked, values, strict=True))
    return {}


def software(task: CheckTask, what: str) -> Row:
    """Versions of Python, torch and its libraries, and other installed packages."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    figures: Figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        **{name: _installed(name) for name in PACKAGES},
        "moesys": __version__,
        "commit": commit(),
    }
    said = ", ".join(f"{name} {value or 'missing'}" for name, value in figures.items())
    return Row(what, "passed", said, figures)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with "+" for changed files; None outside of a git repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    head = subprocess.run([git, "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run([git, "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None
