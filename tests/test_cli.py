"""Subcommands that only print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moesys import cli
from moesys.config.load import load

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


def test_an_override_may_follow_an_option(capsys):
    assert cli.main(["launch", str(QUICKSTART), "--dry-run", "parallel.pp=1", "name=other"]) == 0
    assert "other: 4 ranks on 1 node" in capsys.readouterr().out


def test_a_word_that_is_no_override_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", str(QUICKSTART), "--dry-run", "--nonsense"])
    assert stop.value.code == 2
    assert "--nonsense" in capsys.readouterr().err
