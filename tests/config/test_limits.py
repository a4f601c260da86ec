"""What would never end, or fill the memory, ends in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesys.config import legal
from moesys.config.load import attempt
from moesys.errors import ConfigError
from moesys.parallel.degrees import divisors
from moesys.train.validate import load_checked

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MODEL = "model: {hidden: 64, layers: 2, ffn_hidden: 128}\n"
NINE = "a0: &a0 [1, 2, 3]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
LONG = f"a: &a {'x' * 100_000}\nparallel: {{tp: [{', '.join(['*a'] * 20_000)}]}}\n"


def problems(tmp_path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return [str(problem) for problem in attempt(path, overrides).problems]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('include: "a\\0b"\n', "include: holds a NUL character"),
        (f"include: {'x' * 300}\n", "a file's name has at most 255 characters, and this one 300"),
        (f"include: {'x/' * 3000}\n", "there is no file"),
        (NINE, "stands for more than 100,000 values, aliases included\n    remedy: use fewer aliases"),
        (LONG, "parallel.tp is ['xxx"),
        (f"seed: {'9' * 5000}\n", "seed: has 5000 digits"),
        ('data: {path: "\\ud800"}\n', "data.path: holds half a character, \\ud800"),
        ('launch: {env: {"a\\0": x}}\n', "launch.env: has a key that holds a NUL character"),
        ("launch: {env: {A=B: x}}\n", "launch.env.A=B: a name here must be text of letters, digits and underscores"),
        ("launch: {slurm: {-p: x}}\n", "a name here must be text of small letters, digits and dashes"),
        (f"name: {'a' * 300}\n", "has 300 characters, and must have at most 200"),
    ],
)
def test_a_file(tmp_path, text, said):
    found = problems(tmp_path, MODEL + text)
    assert sum(said in problem for problem in found) == 1, found
    assert all(len(problem) < 10_000 for problem in found)


def test_includes_of_includes(tmp_path):
    for i in range(40):
        (tmp_path / f"f{i}.yaml").write_text(f"include: [f{i + 1}.yaml, f{i + 1}.yaml]\n")
    (tmp_path / "f40.yaml").write_text(MODEL)
    (found,) = problems(tmp_path, "include: f0.yaml\n")
    assert "makes more than 200 files" in found


def test_a_key_of_a_thousand_names(tmp_path):
    (found,) = problems(tmp_path, MODEL, "a." * 1000 + "b=1")
    assert "has 1001 names" in found and len(found) < 400


KEYS = list(legal.keys())
BOUNDED = [key for key in KEYS if legal.limits(legal.type_at(key.split(".")))]


@pytest.mark.parametrize("key", BOUNDED)
def test_numbers_beyond_any_use_are_refused_with_the_bound(key):
    """Whatever is looped over or allocated by: with no bound a slip of zeros runs out of time or memory."""
    listed = key in ("parallel.pp_split", "measure.steps")
    overrides = [f"{key}=[{10**19}]" if listed else f"{key}={10**19}"]
    found = [problem for problem in attempt(QUICKSTART, overrides).problems if problem.key == key]
    assert len(found) == 1 and "must be at most" in found[0].rule, found


def test_every_whole_number_has_a_bound():
    unbounded = [
        key
        for key in KEYS
        for kind in legal.alternatives(legal.type_at(key.split(".")))
        if legal.accepts(kind, int) and not legal.limits(kind)
    ]
    assert unbounded == ["measure.metrics_port"], "its own range is told whole"


def test_bounds_are_told_where_they_are_broken_alone():
    (found,) = attempt(QUICKSTART, ["model.hidden=0"]).problems
    assert found.rule == "must be a whole number of at least 1"
    (found,) = attempt(QUICKSTART, ["model.layers=1000000000"]).problems
    assert found.rule == "must be at most 1,024"


def test_the_world_has_a_bound():
    with pytest.raises(ConfigError, match=r"nodes\(262144\) · ranks_per_node\(1024\) = 268435456 ranks are more than"):
        load_checked(QUICKSTART, ["cluster.nodes=262144", "cluster.ranks_per_node=1024"], with_data=False)


def test_divisors_of_large_numbers():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36] and divisors(1) == [1] and divisors(7) == [1, 7]
    assert divisors(2**40) == [2**i for i in range(41)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x" * 300, "cannot be a folder: file name too long"),
        ('"a\\nb"', "without control characters"),
        ("/dev/null/x", "is below /dev/null, a file"),
        ("''", "must be the name of a folder"),
    ],
)
@pytest.mark.parametrize("key", ["output.runs", "data.cache"])
def test_a_folder_that_cannot_be_is_told(key, given, said):
    with pytest.raises(ConfigError) as caught:
        load_checked(QUICKSTART, [f"{key}={given}"], with_data=False)
    assert [p.key for p in caught.value.problems] == [key] and said in caught.value.problems[0].rule


@pytest.mark.parametrize("given", ["-x", "../..", "a b", "$x$\\frac", "100%", "ü/名"])
def test_folders_of_odd_names_are_legal(given):
    config = load_checked(QUICKSTART, [f"output.runs='{given}'"], with_data=False)
    assert config.output.runs == given
