"""Tasks of lm-evaluation-harness on a trained model: files and names of tasks, and what they find."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import changed

from moesys import cli
from moesys.config import Config
from moesys.data.corpus import open_corpus
from moesys.errors import FileError
from moesys.models.decoder import Decoder
from moesys.train import checkpoint, eval_tasks
from moesys.train.engine import engine_of
from moesys.train.loop import Trainer

ROWS = [{"question": q, "choices": [" of", " and", "the"], "answer": n % 3} for n, q in enumerate("abcdefghij")]


@pytest.fixture(scope="module")
def saved(small: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of random weights, large enough for the choices to differ."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = Config.model_validate(changed(small, {"model": {"layers": 2, "init_std": 0.3}}))
    trainer = Trainer(config, engine_of(config).connect(config), open_corpus(config))
    yield checkpoint.save(tmp_path_factory.mktemp("run"), trainer.engine, trainer.corpus, 0, 0)
    dist.destroy_process_group()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text = f"""
task: three_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    path = tmp_path / "three.yaml"
    path.write_text(text)
    return path


@torch.no_grad()
def accuracy(model: Decoder) -> float:
    """Share of the rows whose answer is the choice of highest probability, written out."""
    right = 0
    for row in ROWS:
        chances = []
        for choice in row["choices"]:
            text = torch.from_numpy(np.frombuffer((row["question"] + choice).encode(), np.uint8).astype(np.int64))[None]
            logits = model(text, torch.stack((torch.arange(text.shape[1])[None], text), -1)).log_softmax(-1)
            chances.append(float(logits[0, :-1].gather(1, text[0, 1:, None])[len(row["question"]) - 1 :].sum()))
        right += int(np.argmax(chances)) == row["answer"]
    return right / len(ROWS)


def test_a_task_finds_what_the_native_model_does(saved, task, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="an extra that the suite does without: moesys[eval]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "metrics.json"
    assert cli.main(["eval", str(saved), "--tasks", str(task), "--json", str(path)]) == 0
    metrics = json.loads(path.read_text())["tasks"]["three_words"]
    assert metrics["acc,none"] == pytest.approx(accuracy(checkpoint.model(saved)))
    assert "three_words" in capsys.readouterr().out
    assert cli.main(["eval", str(saved), "--tasks", "no_such_task"]) == 2
    assert "lm-evaluation-harness has no task no_such_task" in capsys.readouterr().err


def test_tasks_are_names_or_files(tmp_path, task):
    group = tmp_path / "group.yml"
    group.write_text("# some\ngroup: 'mine'\ntask: [a, b]\n")
    names, folders = eval_tasks.named(["hellaswag", str(task), str(group)])
    assert names == ["hellaswag", "three_words", "mine"] and folders == [tmp_path]
    group.write_text("dataset_path: json\n")
    with pytest.raises(FileError, match=r"--tasks: .*group\.yml names no task\n    remedy: give it a line task: NAME"):
        eval_tasks.named([str(group)])
    with pytest.raises(FileError, match=r"--tasks: gone\.yaml: no such file"):
        eval_tasks.named(["gone.yaml"])


def test_metrics_have_their_errors(capsys):
    from rich.console import Console

    metrics = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.25, "exact,strict": 1, "exact_stderr,strict": "N/A"}
    Console().print(eval_tasks.table("model", {"x": metrics}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines] == [
        ["x", "acc", "0.5000", "0.2500"],
        ["x", "exact, strict", "1.0000", ""],
    ]


def test_what_does_not_go_with_tasks_is_refused(tmp_path, monkeypatch, capsys):
    for words in (["--data", "x", "--tasks", "y"], ["train.seq_len=8", "--tasks", "y"], ["--limit", "3"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", str(tmp_path), *words])
        assert stop.value.code == 2
        assert "no effect with --tasks" in (told := capsys.readouterr().err) or "--limit goes with --tasks" in told
    monkeypatch.setattr(eval_tasks, "NEEDED", ("a_package_that_nobody_has",))
    assert cli.main(["eval", str(tmp_path), "--tasks", "y"]) == 2
    assert (
        'needs the package a_package_that_nobody_has, which is not installed\n    remedy: pip install "moesys[eval]"'
        in (capsys.readouterr().err)
    )
