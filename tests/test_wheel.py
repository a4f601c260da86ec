"""The wheel, installed into an environment of its own: whole, and usable far from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("parallel", "kernels", "launchers", "configs", "docs")
"""Folders at the top that the package holds through links."""

Run = Callable[..., str]


def call(*words: object, **more: object) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory) -> Run:
    """Runs a program of an environment that has the wheel, and this environment's other packages."""
    home, here = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    venv.create(home, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check")
    call(*pip, "install", "-q", "--no-deps", wheel, env=env)
    (site,) = home.glob("lib/python*/site-packages")
    # A line of a .pth file adds a folder without its own .pth files: an editable install there is not seen.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return lambda program, *words: call(home / "bin" / program, *words, cwd=here, env=env)


def test_every_file_of_the_package_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not any("benchmarks/" in name for name in names), "comparisons with other systems are of a checkout alone"
    tracked = call("git", "ls-files", "moesys", *LINKED, cwd=ROOT).split()
    of_the_package = [name if name.startswith("moesys/") else f"moesys/{name}" for name in tracked]
    missing = {name for name in of_the_package if name not in names and not (ROOT / name).is_dir()}
    site = ("moesys/docs/generate/", "moesys/docs/style/", "moesys/docs/requirements.txt")
    assert {name for name in missing if not name.startswith(site)} == set(), "all but what builds the site"


def test_the_command_works_in_any_folder(run):
    version = run("python", "-c", "import moesys; print(moesys.__version__)").strip()
    assert run("moesys", "--version") == f"moesys {version}\n"
    run("moesys", "init", "mixtral-8x7b")
    assert "legal on 128 ranks" in run("moesys", "config", "mixtral-8x7b.yaml", "--check")
    run("python", "-c", "open('mine.yaml', 'w').write('include: [olmoe-1b-7b, clusters/node-8gpu.yaml]')")
    assert "vocab_size: 50304" in run("moesys", "config", "mine.yaml")
    code = """
import contextlib, io
from moesys.cli import main
with contextlib.redirect_stderr(io.StringIO()) as said:
    print(main(["bench", "train", "mine.yaml"]))
print(said.getvalue())
"""
    refused = run("python", "-c", code)
    assert refused.startswith("2\n") and "bench train compares with another system" in refused
    assert "remedy: in a checkout of the repository" in refused


def test_the_library_works(run):
    code = """
import moesys, torch
layer = moesys.MoELayer(moesys.TopKGate(16, experts=4, top_k=2), moesys.Experts(4, 16, 8))
layer(torch.randn(2, 3, 16)).sum().backward()
print(moesys.__file__, layer.experts.fc1.grad.shape)
"""
    assert "site-packages/moesys/__init__.py torch.Size([4, 16, 2, 8])" in run("python", "-c", code)
