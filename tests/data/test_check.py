from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
from support import calls

from moesys.data.check import check
from moesys.data.corpus import open_corpus
from moesys.errors import DataError


@pytest.fixture
def place(tmp_path, monkeypatch, write_lines, tokenizer_file):
    """A working directory with good and bad data."""
    monkeypatch.chdir(tmp_path)
    for folder in ("good", "empty", "hollow", "images", "broken"):
        (tmp_path / folder).mkdir()
    for number in range(40):
        (tmp_path / "good" / f"{number}.txt").write_text("some text\n" * 30)
    (tmp_path / "hollow" / "a.txt").touch()
    (tmp_path / "images" / "a.png").write_bytes(b"png")
    (tmp_path / "broken" / "a.txt").symlink_to("nowhere")
    (tmp_path / "data.parquet").write_bytes(b"PAR1" * 100)
    (tmp_path / "empty.json").touch()
    (tmp_path / "corpus.pdf").write_bytes(b"%PDF")
    (tmp_path / "short.txt").write_text("0123456789")
    (tmp_path / "unbalanced.txt").write_text("0123456789" * 10)
    write_lines(tmp_path / "good.jsonl", *({"text": "some text " * 20} for _ in range(40)))
    write_lines(tmp_path / "short.jsonl", {"text": "x"})
    write_lines(tmp_path / "body.jsonl", {"body": "x"}, {"text": "x"})
    (tmp_path / "broken.jsonl").write_text("not json\n")
    (tmp_path / "words.json").write_text("some words")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "config.json").write_text('{"model": {"type": "BPE"}}')
    (tmp_path / "odd.json").write_text('{"model": {"type": "Nonsense", "vocab": {"a": 0}}, "added_tokens": []}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "strings.json").write_text('{"model": {"type": "BPE", "vocab": {"a": "b"}}}')
    (tmp_path / "added.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{}]}')
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "\n")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": 3}')
    (tmp_path / "lone.bin").write_bytes(b"\0" * 100)
    (tmp_path / "wrong.bin").write_bytes(b"\0" * 100)
    (tmp_path / "wrong.idx").write_bytes(b"\0" * 100)
    return tmp_path


LONG = "x" * 300
NO_INTEGERS = "its vocabulary has ids that are not integers"
MISTAKES = {
    "text without a path": ({"kind": "text"}, "data.path", "is needed with data.kind text"),
    "a path without its kind": ({"path": "good"}, "data.path", "must be absent with data.kind python-stdlib"),
    "a missing file": ({"kind": "text", "path": "gone.txt"}, "data.path", "no such file or folder"),
    "another suffix": ({"kind": "text", "path": "corpus.pdf"}, "data.path", "must end in one of .txt, .md"),
    "an empty folder": ({"kind": "text", "path": "empty"}, "data.path", "the folder holds no file that ends in"),
    "no text in the folder": ({"kind": "text", "path": "images"}, "data.path", "the folder holds no file that"),
    "empty files": ({"kind": "text", "path": "hollow"}, "data.path", "holds no text: every file is empty"),
    "a broken link": ({"kind": "text", "path": "broken"}, "data.path", "cannot read broken/a.txt: No such file"),
    "lines that are not JSON": ({"kind": "text", "path": "broken.jsonl"}, "data.path", "broken.jsonl:1: not JSON"),
    "lines without the field": (
        {"kind": "text", "path": "body.jsonl"},
        "data.path",
        'body.jsonl:1: has no field "text" (data.text_key), but body',
    ),
    "text shorter than a sequence": (
        {"kind": "text", "path": "short.txt"},
        "data.path",
        "held-out tokens are fewer than one sequence: train.seq_len(8) + 1 = 9",
    ),
    "too little held out": (
        {"kind": "text", "path": "unbalanced.txt", "heldout": 0.01},
        "data.path",
        "2 held-out tokens are fewer than one sequence",
    ),
    "too few lines": (
        {"kind": "text", "path": "short.jsonl"},
        "data.path",
        "holds at most 15 tokens, fewer than one sequence for training and one held out: 2 · (train.seq_len(8)",
    ),
    "a missing tokenizer": ({"tokenizer": "gone.json"}, "data.tokenizer", "no such file"),
    "a folder as tokenizer": ({"tokenizer": "folder"}, "data.tokenizer", "must be a file, and is a folder"),
    "a tokenizer that is not JSON": ({"tokenizer": "words.json"}, "data.tokenizer", "words.json is not JSON"),
    "JSON of another kind": ({"tokenizer": "list.json"}, "data.tokenizer", "list.json is not a tokenizer.json"),
    "a model's config as tokenizer": ({"tokenizer": "config.json"}, "data.tokenizer", "is not a tokenizer.json"),
    "a tokenizer nobody knows": ({"tokenizer": "odd.json"}, "data.tokenizer", "odd.json is not a tokenizer of the"),
    "a dataset without a path": ({"kind": "huggingface"}, "data.path", "is needed with data.kind huggingface"),
    "a missing dataset": (
        {"kind": "huggingface", "path": "./gone/away"},
        "data.path",
        "no such file or folder, and no name of a dataset",
    ),
    "a missing dataset file": ({"kind": "huggingface", "path": "gone.parquet"}, "data.path", "no such file or folder"),
    "an empty dataset file": ({"kind": "huggingface", "path": "empty.json"}, "data.path", "holds no text"),
    "a dataset of lines without the field": (
        {"kind": "huggingface", "path": "body.jsonl"},
        "data.path",
        'body.jsonl:1: has no field "text" (data.text_key), but body',
    ),
    "a dataset file of another kind": ({"kind": "huggingface", "path": "corpus.pdf"}, "data.path", "must end in one"),
    "a folder without a dataset": ({"kind": "huggingface", "path": "images"}, "data.path", "is not a dataset saved"),
    "tokens without a path": ({"kind": "megatron"}, "data.path", "is needed with data.kind megatron"),
    "missing tokens": ({"kind": "megatron", "path": "gone"}, "data.path", "no such file: gone.bin, gone.idx"),
    "tokens without an index": ({"kind": "megatron", "path": "lone"}, "data.path", "no such file: lone.idx"),
    "an index that is none": ({"kind": "megatron", "path": "wrong"}, "data.path", "wrong.idx is not an index of a"),
    "an empty path": ({"kind": "text", "path": ""}, "data.path", "is needed with data.kind text"),
    "an empty prefix": ({"kind": "megatron", "path": ""}, "data.path", "is needed with data.kind megatron"),
    "an empty name": ({"kind": "huggingface", "path": ""}, "data.path", "is needed with data.kind huggingface"),
    "a path too long": ({"kind": "text", "path": f"{LONG}.txt"}, "data.path", "File name too long"),
    "a tokenizer's path too long": ({"tokenizer": LONG}, "data.tokenizer", "File name too long"),
    "a prefix too long": ({"kind": "megatron", "path": LONG}, "data.path", "File name too long"),
    "a dataset's path too long": ({"kind": "huggingface", "path": LONG}, "data.path", "File name too long"),
    "a NUL in a path": ({"kind": "text", "path": "a\0.txt"}, "data.path", "no such file or folder"),
    "a NUL in a prefix": ({"kind": "megatron", "path": "a\0"}, "data.path", r"no such file: a\0.bin, a\0.idx"),
    "nobody's home": ({"kind": "text", "path": "~nobody-here/a.txt"}, "data.path", "no such file or folder"),
    "nobody's tokenizer": ({"tokenizer": "~nobody-here/t.json"}, "data.tokenizer", "no such file or folder"),
    "nobody's dataset": ({"kind": "huggingface", "path": "~nobody-here/x"}, "data.path", "no such file or folder"),
    "a link to itself": ({"kind": "text", "path": "loop.txt"}, "data.path", "cannot read loop.txt: Too many levels"),
    "a pipe": ({"kind": "text", "path": "pipe.txt"}, "data.path", "pipe.txt is neither a file nor a folder"),
    "a pipe as tokenizer": ({"tokenizer": "pipe.json"}, "data.tokenizer", "must be a regular file"),
    "a pipe as dataset": ({"kind": "huggingface", "path": "pipe.json"}, "data.path", "is neither a file nor a folder"),
    "lines of brackets": ({"kind": "text", "path": "deep.jsonl"}, "data.path", "deep.jsonl:1: not JSON: maximum"),
    "a tokenizer of brackets": ({"tokenizer": "deep.json"}, "data.tokenizer", "deep.json is not JSON: maximum"),
    "ids that are strings": ({"tokenizer": "strings.json"}, "data.tokenizer", NO_INTEGERS),
    "added tokens without ids": ({"tokenizer": "added.json"}, "data.tokenizer", "its added_tokens are not a list"),
    "a dataset without splits": (
        {"kind": "huggingface", "path": "saved"},
        "data.path",
        "saved/dataset_dict.json lists no splits",
    ),
    "a vocabulary below the tokenizer's": (
        {"vocab_size": 100},
        "model.vocab_size",
        "must be at least the vocabulary of data.tokenizer(bytes) = 257",
    ),
}


@pytest.mark.parametrize(("keys", "key", "rule"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_has_its_one_problem(place, configure, keys, key, rule):
    found: list = []
    assert calls(lambda: found.extend(check(configure(**keys)))) < 500_000, "it reads no more than it must"
    (problem,) = found
    assert problem.key == key
    assert rule in problem.rule
    assert problem.remedy
    assert "\n" not in problem.rule + problem.remedy


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"kind": "text", "path": "good"},
        {"kind": "text", "path": "good.jsonl"},
        {"kind": "text", "path": "good", "tokenizer": "folder/tokenizer.json"},
        {"kind": "text", "path": "good", "vocab_size": 257},
        {"kind": "huggingface", "path": "data.parquet"},
        {"kind": "huggingface", "path": "owner/name-1.2"},
        {"kind": "huggingface", "path": "imdb"},
    ],
)
def test_what_is_right_has_none(place, configure, keys):
    assert check(configure(**keys)) == []


def test_all_problems_at_once(place, configure):
    problems = check(configure(kind="text", path="gone", tokenizer="gone.json"))
    assert [problem.key for problem in problems] == ["data.path", "data.tokenizer"]


def test_pipes_in_a_folder_are_left_out(place, configure):
    os.mkfifo(place / "good" / "a.txt")
    config = configure(kind="text", path="good")
    assert check(config) == []
    opened = open_corpus(config)
    assert len(opened.train) + len(opened.heldout) == 40 * 301


def test_home_is_understood(place, configure, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    config = configure(kind="text", path="~/good", tokenizer="~/folder/tokenizer.json", cache="~/mine")
    assert check(config) == []
    open_corpus(config)
    assert list((place / "mine").glob("*.npy"))


@pytest.mark.parametrize("size", range(60, 400, 7))
def test_size_is_refused_here_exactly_when_it_is_later(tmp_path, configure, size):
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    config = configure(kind="text", path=tmp_path / "a.txt")
    refused = bool(check(config))
    try:
        open_corpus(config)
        assert not refused
    except DataError:
        assert refused or size * 0.05 > 3  # a cut may move by a few bytes


@pytest.mark.parametrize(
    ("package", "keys", "key"),
    [
        ("datasets", {"kind": "huggingface", "path": "imdb"}, "data.kind"),
        ("megatron.core", {"kind": "megatron", "path": "lone"}, "data.kind"),
        ("tokenizers", {"tokenizer": "folder/tokenizer.json"}, "data.tokenizer"),
    ],
)
def test_missing_packages_are_named(place, configure, monkeypatch, package, keys, key):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    problem = check(configure(**keys))[0]
    assert problem.key == key
    assert problem.rule == f"needs the package {package.replace('.', '-')}, which is not installed"
    assert "pip install" in problem.remedy


def test_files_without_permission(place, configure):
    """As another user: root may read everything."""
    folder = place / "secret"
    folder.mkdir()
    (folder / "a.txt").write_text("some text\n" * 100)
    (folder / "a.txt").chmod(0)
    (folder / "b.jsonl").write_text('{"text": "x"}\n')
    (folder / "b.jsonl").chmod(0)
    (folder / "closed").mkdir(mode=0)
    program = """
        import os, sys
        from moesys.config.schema import Config, DataConfig, ModelConfig
        from moesys.data.check import check
        os.chdir(sys.argv[1])
        if os.getuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        kinds = [("text", path) for path in (".", "a.txt", "b.jsonl", "closed", "closed/a.txt")]
        for kind, path in [*kinds, ("huggingface", "closed/a"), ("megatron", "closed/a")]:
            data = DataConfig(kind=kind, path=path)
            (problem,) = check(Config(model=ModelConfig(hidden=8, layers=1), data=data))
            print(problem.key, problem.rule)
        # Before it there may be one more: the standard library can lie in a home of the first user's.
        problem = check(Config(model=ModelConfig(hidden=8, layers=1), data=DataConfig(tokenizer="closed/t")))[-1]
        print(problem.key, problem.rule)
    """
    folder.chmod(0o755)
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "data.path cannot read ./closed: Permission denied"
    assert lines[1] == "data.path cannot read a.txt: Permission denied"
    assert lines[2] == "data.path cannot read b.jsonl: Permission denied"
    assert lines[3] == "data.path cannot read closed: Permission denied"
    assert lines[4] == "data.path cannot read closed/a.txt: Permission denied"
    assert lines[5] == "data.path cannot read closed/a: Permission denied"
    assert lines[6] == "data.path cannot read closed/a.bin: Permission denied"
    assert lines[7] == "data.tokenizer cannot read closed/t: Permission denied"
