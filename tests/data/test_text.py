from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from moesys.config.schema import DataConfig
from moesys.data import stdlib, text
from moesys.errors import DataError


def names(path, **keys):
    return [document.name for document in text.documents(DataConfig(kind="text", path=str(path), **keys))]


def test_a_file_is_a_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"one\r\n\xff two")
    assert list(text.documents(DataConfig(kind="text", path=str(path)))) == [("book.txt", b"one\r\n\xff two")]


def test_a_folder_is_read_with_everything_below_sorted_by_name(tmp_path):
    for name in ("b/2.txt", "b/1.md", "a.py", "b-.txt", "z/deep/down.txt", "c.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}\n{"text": "y"}\n')
    expected = ["a.py", "b-.txt", "b/1.md", "b/2.txt", "c.jsonl:1", "c.jsonl:2", "z/deep/down.txt"]
    assert names(tmp_path) == expected


def test_the_order_does_not_hang_on_the_file_system(tmp_path):
    letters = [f"{letter}.txt" for letter in "hgbeadcf"]
    for folder, order in (("one", letters), ("two", sorted(letters))):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(name)
    assert names(tmp_path / "one") == names(tmp_path / "two") == sorted(letters)


def test_other_and_hidden_files_are_left_out(tmp_path):
    for name in ("a.txt", "b.bin", ".hidden.txt", ".git/x.txt", "__pycache__/y.py", "c.TXT"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert names(tmp_path) == ["a.txt"]


def test_links_are_followed_once(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("x")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "b.txt").symlink_to(tmp_path / "far" / "a.txt")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "here" / "more").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "here")
    assert names(tmp_path / "here") == ["b.txt", "link/a.txt"]


def test_lines_are_documents(tmp_path, write_lines):
    path = write_lines(tmp_path / "a.jsonl", {"text": "größer"}, {"text": ""}, {"text": "🙂", "id": 3})
    path.write_bytes(b"\n" + path.read_bytes() + b"  \n")
    found = list(text.documents(DataConfig(kind="text", path=str(path))))
    assert found == [("a.jsonl:2", "größer".encode()), ("a.jsonl:3", b""), ("a.jsonl:4", "🙂".encode())]


def test_the_field_can_be_named(tmp_path, write_lines):
    path = write_lines(tmp_path / "a.jsonl", {"content": "x"})
    assert [d.text for d in text.documents(DataConfig(kind="text", path=str(path), text_key="content"))] == [b"x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "a.jsonl:17: not JSON: "),
        (b"\xff\xfe", "a.jsonl:17: not JSON: "),
        (b"[1, 2]", 'a.jsonl:17: has no field "text" (data.text_key), but no fields'),
        (b'{"body": "x", "id": 1}', 'a.jsonl:17: has no field "text" (data.text_key), but body, id'),
        (b'{"text": null}', 'a.jsonl:17: the field "text" (data.text_key) must be a string'),
    ],
)
def test_a_bad_line_is_named(tmp_path, write_lines, line, message):
    path = write_lines(tmp_path / "a.jsonl", *({"text": "x"} for _ in range(16)))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError) as raised:
        names(path)
    assert str(tmp_path / message) in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file or directory"):
        names(tmp_path)


def test_identity_changes_with_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    data = DataConfig(kind="text", path=str(tmp_path))
    found = [text.identity(data)]
    os.utime(tmp_path / "a.txt", ns=(0, 1))
    found.append(text.identity(data))
    (tmp_path / "b.txt").write_text("y")
    found.append(text.identity(data))
    assert found[0] != found[1] != found[2]
    assert text.identity(data) == found[2]


def test_the_standard_library_is_real_text_without_its_tests():
    found = list(stdlib.documents(DataConfig()))
    by_name = {document.name: document.text for document in found}
    root = Path(sysconfig.get_paths()["stdlib"])
    assert by_name["argparse.py"] == (root / "argparse.py").read_bytes()
    assert by_name["json/decoder.py"] == (root / "json" / "decoder.py").read_bytes()
    assert [d.name for d in found] == sorted(by_name)
    assert sum(map(len, by_name.values())) > 5_000_000
    folders = {part for name in by_name for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
