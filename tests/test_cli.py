"""Subcommands that only print."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moesys import cli
from moesys.command_line import Parser, parser
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


def parsers(found: Parser | None = None) -> list[Parser]:
    """Every command's parser, those of groups as well."""
    found = found or parser()
    inner = [a for a in found._actions if isinstance(a, argparse._SubParsersAction)]
    return [found, *(p for action in inner for sub in action.choices.values() for p in parsers(sub))]


@pytest.mark.parametrize("sub", parsers(), ids=lambda sub: sub.prog)
def test_help_has_an_example_a_guide_and_every_default(sub):
    text = sub.format_help()
    example = text.split("example:\n")[1].split("\n")[0].split()
    assert " ".join(example).startswith(sub.prog)
    assert Path(text.split("guide:\n")[1].split("\n")[0].strip()).is_file()
    for action in sub._actions:
        shown = sub._get_formatter()._get_help_string(action) if action.help else ""
        needs = action.option_strings and action.nargs != 0 and not isinstance(action, argparse._VersionAction)
        assert not needs or "default" in shown, f"{sub.prog} {action.option_strings}: {shown}"
        assert action.help, f"{sub.prog} {action.option_strings or action.dest}"


def test_examples_are_understood():
    for sub in parsers():
        example = sub.epilog.split("example:\n")[1].split("\n")[0].split()[1:]
        arguments, rest = parser().parse_known_args(example)
        assert rest == [] and arguments.run in cli.COMMANDS


def test_every_command_has_its_function():
    assert {sub.get_default("run") for sub in parsers()} - {None} == set(cli.COMMANDS)


COMMANDS = ["launch", "sweep", "config", "verify", "bench train", "bench a2a", "bench measure", "bench megatron"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.steps=10"], "overrides are written without dashes: train.steps=10"),
        (["--train.steps", "10"], "overrides are written without dashes: train.steps=10"),
        (["train.steps=3", "-train.steps=10"], "overrides are written without dashes: train.steps=10"),
        (["--nonsense"], "unrecognized argument --nonsense"),
    ],
)
def test_an_override_with_dashes_is_told(capsys, command, words, said):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), str(QUICKSTART), *words])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"moesys {command}: ") and said in told and f"moesys {command} --help" in told


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["launch", "x.yaml", "--dryrun"], "--dry-run"),
        (["launch", "x.yaml", "--dry_run"], "--dry-run"),
        (["launch", "x.yaml", "--mesure"], "--measure"),
        (["launch", "x.yaml", "--launcher", "torchrun"], "local"),
        (["lauch", "x.yaml"], "launch"),
        (["whatif", "run"], "what-if"),
        (["verify", "x.yaml", "--dtype", "bf16"], "bfloat16"),
        (["verify", "x.yaml", "--tolerence=1"], "--tolerance"),
        (["bench", "a2a", "x.yaml", "--nocheck"], "--no-check"),
        (["bench", "layer", "--device", "gpu"], "cuda"),
        (["report", "run", "--perffetto=x"], "--perfetto"),
        (["what-if", "run", "--profil_e", "x"], "--profile"),
        (["config", "x.yaml", "--chekc"], "--check"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(capsys, words, meant):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["report", "a", "seed=1"], ["what-if", "a", "parallel.ep=2"]])
def test_a_command_without_a_configuration_takes_no_overrides(capsys, words, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words[:-1], "--profile", "links.yaml", words[-1]])
    assert stop.value.code == 2 and "unrecognized argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["a", "b", "--perfetto", "x.json"], ["--trace", "t.json", "--profile", "x"], ["a", "--trace", "t.json"]]
)
def test_options_of_report_that_would_have_no_effect_are_refused(capsys, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *words])
    assert stop.value.code == 2
    assert "--" in capsys.readouterr().err.splitlines()[0]


def test_what_is_shipped_is_listed_and_found_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "configs/quickstart.yaml" in listed and "configs/models/mixtral-8x7b.yaml" in listed
    assert cli.main(["config", "configs/quickstart.yaml", "--check"]) == 0
    capsys.readouterr()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("seed: x")
    assert cli.main(["config", "configs/quickstart.yaml", "--check"]) == 2, "a file that is there wins"


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    words = [sys.executable, "-m", "moesys.cli", "config", "--schema"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()
    process.stderr.close()
