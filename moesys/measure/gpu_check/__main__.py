"""The command of the GPU check.

python -m moesys.measure.gpu_check                # on a machine with a GPU; a dry run on any other
python -m moesys.measure.gpu_check --dry-run      # the parts that a CPU can run, at shrunken shapes
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moesys.measure.gpu_check import check

PARTS = {plan.name: plan for plan in check.PLANS}

DRY = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
"""The environment of a dry run. Triton reads it at import."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns 1 if a part failed."""
    options = _parser().parse_args(arguments)
    dry = options.dry_run or not _has_gpu()
    if dry:
        os.environ.update(DRY)
    if dry and not options.dry_run:
        print("torch finds no GPU here: a dry run of what the CPU can do, at shrunken shapes", flush=True)
    words = ["python -m moesys.measure.gpu_check", *(sys.argv[1:] if arguments is None else arguments)]
    plans = [plan for name, plan in PARTS.items() if not options.parts or name in options.parts]
    folder = options.out.resolve()
    report = check.run(plans, dry, folder, options.patience, " ".join(words))
    print(f"{report.summary()} {folder / 'gpu-check.md'} is the table, {folder / 'gpu-check.json'} has every figure")
    return 1 if report.failures else 0


def _has_gpu() -> bool:
    """Whether torch finds a GPU. Another process asks, because asking initialises CUDA."""
    asked = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    code = subprocess.run([sys.executable, "-c", asked]).returncode
    if code not in (0, 3):
        sys.exit(f"moesys gpu-check: {sys.executable} cannot import torch\n    remedy: install torch for it")
    return code == 0


def _parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m moesys.measure.gpu_check",
        description="Checks what runs on this machine's GPU and how fast, in under 8 minutes. Needs torch alone.",
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, at shrunken shapes")
    text = f"run these alone: {', '.join(PARTS)}"
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=text)
    text = "where tables and logs go (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), metavar="FOLDER", help=text)
    text = "factor on every part's seconds (default: %(default)s)"
    parser.add_argument("--patience", type=_factor, default=1.0, metavar="FACTOR", help=text)
    return parser


def _factor(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
