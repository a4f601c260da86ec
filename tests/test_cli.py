"""Subcommands that only print."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from moesys import cli
from moesys.config.load import load
from moesys.files import write_whole

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def test_config_prints_what_a_run_would_use(capsys, tmp_path):
    assert cli.main(["config", str(QUICKSTART), "train.steps=7", "parallel.tp=2"]) == 0
    text = capsys.readouterr().out
    resolved = yaml.safe_load(text)
    assert resolved["train"]["steps"] == 7 and resolved["parallel"]["tp"] == 2
    assert resolved["cluster"]["ranks_per_node"] == 4, "from the included file"
    path = tmp_path / "again.yaml"
    path.write_text(text)
    assert load(path).config == load(QUICKSTART, ["train.steps=7", "parallel.tp=2"]).config


def test_the_schema_is_json_with_descriptions(capsys):
    assert cli.main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "Tensor parallelism" in json.dumps(schema)


@pytest.mark.parametrize("given", [None, "7"])
def test_idle_threads_soon_leave_their_cores_unless_the_caller_says_otherwise(given, monkeypatch):
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    else:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    cli.main(["config", "--schema"])
    assert os.environ["GOMP_SPINCOUNT"] == (given or "10000")


def test_an_override_may_follow_an_option(capsys):
    assert cli.main(["launch", str(QUICKSTART), "--dry-run", "parallel.pp=1", "name=other"]) == 0
    assert "other: 4 ranks on 1 node" in capsys.readouterr().out


def test_a_word_that_is_no_override_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", str(QUICKSTART), "--dry-run", "--nonsense"])
    assert stop.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("verify", "--steps", "0", "whole number of at least 1"),
        ("verify", "--steps", "-1", "whole number of at least 1"),
        ("verify", "--tolerance", "-1e-5", "number of at least 0"),
        ("verify", "--tolerance", "nan", "number of at least 0"),
        ("bench train", "--rounds", "0", "whole number of at least 1"),
        ("bench measure", "--steps", "two", "whole number of at least 1"),
        ("bench megatron", "--rounds", "1.5", "whole number of at least 1"),
    ],
)
def test_a_count_or_tolerance_that_means_nothing_is_refused(capsys, command, option, value, message):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), str(QUICKSTART), f"{option}={value}"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert option in told and repr(value) in told and message in told


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("verify", "--json"),
        ("bench train", "--json"),
        ("bench a2a", "--profile"),
        ("report", "--perfetto"),
        ("report", "--out"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(capsys, tmp_path, command, option):
    for path, message in (
        (tmp_path / "absent" / "file.json", f"there is no folder {tmp_path / 'absent'}"),
        (tmp_path, f"{tmp_path} is a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), str(QUICKSTART), option, str(path)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_file_is_replaced_at_once_and_a_stream_is_written_to(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old", "who reads it goes on reading the file that was"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    stream = tmp_path / "pipe"
    os.mkfifo(stream)
    ends = os.open(stream, os.O_RDWR)
    try:
        write_whole(stream, "told")
        assert os.read(ends, 100) == b"told" and stream.is_fifo()
    finally:
        os.close(ends)
