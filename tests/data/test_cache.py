from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cache_process import build

from moesys.data import cache, corpus, progress, tokenized
from moesys.data.corpus import open_corpus
from moesys.data.tokenizers import ByteTokenizer
from moesys.errors import DataError


def tokens(opened):
    return opened.train[:].tolist(), opened.heldout[:].tolist()


def entries(config):
    return sorted(path.name for path in Path(config.data.cache).iterdir())


@pytest.fixture
def writes(monkeypatch):
    """How often text was tokenized in this process."""
    calls, write = [], tokenized.write

    def counted(*arguments):
        calls.append(1)
        write(*arguments)

    monkeypatch.setattr(corpus.tokenized, "write", counted)
    return calls


def test_the_second_time_is_read_from_disk(library, configure, writes):
    config = configure(kind="text", path=library)
    first, again = open_corpus(config), open_corpus(config)
    assert len(writes) == 1
    assert tokens(first) == tokens(again)
    assert isinstance(again.train.base, np.memmap)
    assert not again.train.flags.writeable
    name = entries(config)[0].split(".")[0]
    assert entries(config) == [f"{name}.{end}" for end in ("heldout.npy", "json", "lock", "train.npy")]


def test_an_entry_is_plain_npy(library, configure):
    config = configure(kind="text", path=library)
    opened = open_corpus(config)
    (path,) = Path(config.data.cache).glob("*.train.npy")
    assert np.load(path).dtype == np.uint16
    assert np.load(path).tolist() == opened.train[:].tolist()


def test_whatever_the_tokens_depend_on_makes_another_entry(library, configure, writes, tokenizer_file):
    variants = [{}, {"heldout": 0.2}, {"tokenizer": tokenizer_file}]
    for keys in variants:
        open_corpus(configure(kind="text", path=library, **keys))
    assert len(writes) == len(variants)
    changed = library / "shelf0" / "book00.txt"
    changed.write_text(changed.read_text().replace("größer", "kleine"))
    os.utime(changed, ns=(1, 1))
    opened = open_corpus(configure(kind="text", path=library))
    assert len(writes) == len(variants) + 1
    decode = opened.tokenizer.decode
    assert "kleine" in (decode(opened.train[:]) + decode(opened.heldout[:])).decode()


def test_what_they_do_not_depend_on_does_not(library, configure, writes):
    open_corpus(configure(kind="text", path=library))
    open_corpus(configure(kind="text", path=library, seq_len=16, vocab_size=300))
    assert len(writes) == 1


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


def spoil_header(path):
    with path.open("r+b") as file:
        file.seek(10)
        file.write(b"{'descr': ((((")


DAMAGE = {
    "truncated": truncate,
    "emptied": lambda path: os.truncate(path, 0),
    "a bit flipped": flip,
    "header spoilt": spoil_header,
    "gone": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"\xff\x00garbage" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("pattern", ["*.train.npy", "*.heldout.npy", "*.json"])
def test_a_damaged_entry_is_made_again(library, configure, writes, damage, pattern):
    config = configure(kind="text", path=library)
    expected = tokens(open_corpus(config))
    (path,) = Path(config.data.cache).glob(pattern)
    damage(path)
    assert tokens(open_corpus(config)) == expected
    assert tokens(open_corpus(config)) == expected
    assert len(writes) == 2


def test_a_folder_that_cannot_be_written_is_no_obstacle(library, configure, tmp_path, caplog):
    expected = tokens(open_corpus(configure(kind="text", path=library)))
    (tmp_path / "file").write_text("")
    for unusable in (tmp_path / "file", tmp_path / "file" / "below", "/proc/moesys"):
        with caplog.at_level(logging.WARNING):
            assert tokens(open_corpus(configure(kind="text", path=library, cache=unusable))) == expected
        assert f"no cache of tokenized text in {unusable} (data.cache)" in caplog.text


def test_a_folder_that_no_name_allows_is_no_obstacle(library, configure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = tokens(open_corpus(configure(kind="text", path=library)))
    for odd in ("x" * 300, "a\0b", "~nobody-here/cache"):
        assert tokens(open_corpus(configure(kind="text", path=library, cache=odd))) == expected


def test_an_entry_whose_place_is_taken_is_no_obstacle(library, configure, caplog):
    config = configure(kind="text", path=library)
    expected = tokens(open_corpus(config))
    (path,) = Path(config.data.cache).glob("*.train.npy")
    path.unlink()
    (path / "folder").mkdir(parents=True)
    assert tokens(open_corpus(config)) == expected
    assert "no cache of tokenized text" in caplog.text


def test_a_disk_that_is_full_is_no_obstacle(library, configure, caplog):
    """/dev/full stands for the disk: it takes no byte."""

    class Full(type(Path())):
        def open(self, mode="r", **rest):
            return super().open(mode, **rest) if mode != "w+b" else open("/dev/full", mode)

    folder = Full(configure(kind="text", path=library).data.cache)

    def write(train, heldout):
        text = (library / "shelf0" / "book00.txt").read_bytes() * 10
        tokenized.write(lambda: iter([tokenized.Document("a", text)]), ByteTokenizer(), 0.5, train, heldout)

    train, _ = cache.open_or_make(folder, "key", np.dtype(np.uint16), write)
    assert "No space left on device" in caplog.text
    assert len(train) > 1000
    assert [path.name for path in Path(folder).iterdir()] == ["key.lock"]


def test_leftovers_of_killed_processes_are_removed(library, configure):
    config = configure(kind="text", path=library)
    open_corpus(config)
    (path,) = Path(config.data.cache).glob("*.train.npy")
    leftover = path.with_name(f"{path.name}.12345.tmp")
    leftover.write_bytes(b"half")
    flip(path)
    open_corpus(config)
    assert not leftover.exists()


def test_an_error_in_the_data_leaves_nothing_behind(tmp_path, configure, write_lines):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"}, {"body": "y"})
    config = configure(kind="text", path=path)
    with pytest.raises(DataError, match=r"a\.jsonl:2: has no field"):
        open_corpus(config)
    assert [name for name in entries(config) if not name.endswith(".lock")] == []


def test_the_default_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache.default_folder() == Path("/var/x/moesys")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.default_folder() == Path("/home/someone/.cache/moesys")


def test_checksums_of_large_arrays_see_all_parts(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 64)
    monkeypatch.setattr(cache, "BLOCKS", 8)
    array = np.arange(10_000, dtype=np.uint16)
    expected = cache.checksum(array)
    assert cache.checksum(array.copy()) == expected
    for place in (0, -1, *np.linspace(0, len(array) - 32, 8, dtype=int)):
        other = array.copy()
        other[place] += 1
        assert cache.checksum(other) != expected


def test_of_several_processes_one_tokenizes(library, configure):
    config = configure(kind="text", path=library)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(6), context.Queue()
    processes = [context.Process(target=build, args=(config, barrier, results, 0.3)) for _ in range(6)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(600)
    assert sorted(made for made, *_ in found) == [0, 0, 0, 0, 0, 1]
    assert len({tuple(facts) for _, *facts in found}) == 1


def test_a_builder_that_is_killed_stops_nobody(library, configure):
    config = configure(kind="text", path=library)
    context = multiprocessing.get_context("spawn")
    alone, results = context.Barrier(1), context.Queue()
    victim = context.Process(target=build, args=(config, alone, results, 600))
    victim.start()
    end = time.monotonic() + 600
    while not list(Path(config.data.cache).glob("*.tmp")) and time.monotonic() < end:
        time.sleep(0.02)
    assert victim.is_alive() and list(Path(config.data.cache).glob("*.tmp"))
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(600)
    expected = tokens(open_corpus(configure(kind="text", path=library, cache=library.parent / "other")))
    assert tokens(open_corpus(config)) == expected
    assert not list(Path(config.data.cache).glob("*.tmp"))


def test_who_waits_says_so(library, configure, monkeypatch, capsys):
    import fcntl

    config = configure(kind="text", path=library)
    open_corpus(config)
    for path in Path(config.data.cache).glob("*.json"):
        path.unlink()
    (lock,) = Path(config.data.cache).glob("*.lock")
    monkeypatch.setattr(progress, "PATIENCE", 0.1)
    holder = lock.open("ab")
    fcntl.flock(holder, fcntl.LOCK_EX)

    def release(_):
        if "waiting" in "".join(said):
            holder.close()

    said = []
    monkeypatch.setattr(cache, "sleep", release)
    monkeypatch.setattr(progress, "print", lambda *a, **k: (said.append(str(a)), print(*a, **k)), raising=False)
    open_corpus(config)
    assert capsys.readouterr().err.count("waiting for another process that tokenizes the text") == 1


def test_progress_is_silent_when_quick_and_one_line_when_not(monkeypatch, capsys):
    bar = progress.Progress("tokenizing", 10)
    bar.advance(5)
    bar.finish()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    bar = progress.Progress("tokenizing", 10)
    for _ in range(10):
        bar.advance(1)
    bar.finish()
    assert capsys.readouterr().err == "moesys: tokenizing 10%\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress.Progress("tokenizing", 2)
    bar.advance(1)
    bar.finish()
    assert capsys.readouterr().err == "\rmoesys: tokenizing 50%\rmoesys: tokenizing done\n"
