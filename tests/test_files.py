"""Files that are whole or absent, and strict JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesys.errors import FileError
from moesys.files import json_objects, json_text, read_json, write_json, write_whole


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_numbers_that_are_not_finite_become_null() -> None:
    text = json_text({"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], "c": 2})
    assert json.loads(text, parse_constant=_refuse) == {"a": None, "b": [None, [1.5, None]], "c": 2}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"step": 1})
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert read_json(path, "none") == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe", b"", b"3", b"[" * 100_000])
def test_a_damaged_file_is_named_with_its_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"(?s){path}.*remedy: remove it"):
        read_json(path, "remove it")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        read_json(tmp_path / "facts.json", "run it first")
    assert list(json_objects(tmp_path / "facts.jsonl")) == []


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste\n[]\n\xff\n{"step": 2}\n{"step"')
    assert list(json_objects(path)) == [{"step": 1}, {"step": 2}]
