"""Files that include files."""

from pathlib import Path

import pytest

from moesys import shipped
from moesys.config.load import load
from moesys.errors import ConfigError

MODEL = "model: {hidden: 64, layers: 2, ffn_hidden: 128}\n"


def write(folder: Path, **files: str) -> Path:
    """Write `NAME.yaml` for each of `files`; the path of run.yaml. Two underscores stand for a slash."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "run.yaml"


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_a_file_wins_over_its_includes_and_a_later_include_over_an_earlier(tmp_path):
    run = write(
        tmp_path,
        run="include: [a.yaml, b.yaml]\ntrain: {steps: 3}\n",
        a=MODEL + "seed: 1\ntrain: {steps: 1, seq_len: 1, micro_batch: 1}\n",
        b="train: {steps: 2, seq_len: 2}\n",
    )
    loaded = load(run)
    train = loaded.config.train
    assert (train.steps, train.seq_len, train.micro_batch, loaded.config.seed) == (3, 2, 1, 1)
    assert loaded.sources["train.steps"] == f"{run}:2"
    assert loaded.sources["train.seq_len"] == f"{tmp_path / 'b.yaml'}:1"
    assert loaded.sources["train.micro_batch"] == f"{tmp_path / 'a.yaml'}:3"
    assert loaded.sources["train"] == f"{run}:2"
    assert "train.dtype" not in loaded.sources


def test_paths_are_relative_to_the_including_file(tmp_path):
    run = write(
        tmp_path,
        run="include: sub/inner.yaml\n",
        sub__inner="include: ../models/m.yaml\nseed: 7\n",
        models__m=MODEL,
    )
    loaded = load(run)
    assert loaded.config.model.hidden == 64 and loaded.config.seed == 7
    assert loaded.sources["model.hidden"] == f"{tmp_path / 'models' / 'm.yaml'}:1"


def test_one_file_may_be_included_twice(tmp_path):
    run = write(tmp_path, run="include: [a.yaml, b.yaml]\n", a="include: m.yaml\n", b="include: m.yaml\n", m=MODEL)
    assert load(run).config.model.layers == 2


def test_lists_and_null_replace_what_was_included(tmp_path):
    run = write(
        tmp_path,
        run="include: m.yaml\nmodel: {moe: null, ffn_hidden: 8}\nparallel: {pp_split: [1, 1]}\n",
        m="model: {hidden: 64, layers: 2, moe: {experts: 4, ffn_hidden: 8}}\nparallel: {pp_split: [2]}\n",
    )
    config = load(run).config
    assert config.model.moe is None and config.parallel.pp_split == [1, 1]


def test_an_empty_section_leaves_what_was_included(tmp_path):
    run = write(tmp_path, run="include: m.yaml\nparallel:\n# tp: 4\n", m=MODEL + "parallel: {tp: 2}\n")
    assert load(run).config.parallel.tp == 2


def test_no_include(tmp_path):
    assert load(write(tmp_path, run="include: []\n" + MODEL)).config.model.hidden == 64
    assert load(write(tmp_path, run="include:\n" + MODEL)).config.model.hidden == 64


def test_a_circle_is_told_with_its_way(tmp_path):
    run = write(tmp_path, run=MODEL + "include: a.yaml\n", a="seed: 1\ninclude:\n  - b.yaml\n", b="include: run.yaml\n")
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    assert problems(run) == [
        f"{b}:1: include is 'run.yaml': goes in a circle: {run} → {a} → {b} → {run}\n"
        "    remedy: remove one of these includes"
    ]


def test_a_file_that_includes_itself(tmp_path):
    run = write(tmp_path, run=MODEL + "include: run.yaml\n")
    assert "goes in a circle" in problems(run)[0]


def test_a_missing_include_names_the_line_and_the_nearest_file_and_nothing_else(tmp_path):
    run = write(tmp_path, run="include:\n  - models/mixtrl.yaml\n", models__mixtral=MODEL)
    folder = tmp_path / "models"
    assert problems(run) == [
        f"{run}:2: include is 'models/mixtrl.yaml': there is no file {folder / 'mixtrl.yaml'}\n"
        f"    remedy: did you mean {folder / 'mixtral.yaml'}?"
    ]


def test_a_folder_as_include(tmp_path):
    run = write(tmp_path, run=MODEL + "include: models\n", models__m=MODEL)
    assert problems(run) == [
        f"{run}:2: include is 'models': {tmp_path / 'models'} is a folder, not a file\n"
        "    remedy: paths are relative to the file that includes"
    ]


@pytest.mark.parametrize(("value", "given"), [("3", "3"), ("[a.yaml, 3]", "3"), ("{a: b}", "{a: 'b'}")])
def test_an_include_that_is_no_path(tmp_path, value, given):
    run = write(tmp_path, run=f"{MODEL}include: {value}\n", a="seed: 1\n")
    assert problems(run) == [f"{run}:2: include is {given}: must be the path of a file, or a list of paths"]


def test_mistakes_in_an_included_file_name_that_file(tmp_path):
    run = write(tmp_path, run="include: m.yaml\ntrain: {steps: 0}\n", m="# shapes\nmodel:\n  hidden: big\n  layer: 2\n")
    found = problems(run)
    m = tmp_path / "m.yaml"
    assert found[0] == (
        f"{m}:2: model.layers: is missing: section model needs it, a whole number of at least 1, "
        "or a section with the keys count, first, repeat\n"
        "    remedy: add layers: to model"
    )
    assert found[1] == f"{m}:3: model.hidden is 'big': must be a whole number of at least 1"
    assert found[2].startswith(f"{m}:4: model.layer: unknown key; section model has vocab_size, hidden, layers")
    assert found[2].endswith("remedy: did you mean model.layers?")
    assert found[3] == f"{run}:2: train.steps is 0: must be a whole number of at least 1"
    assert len(found) == 4


def test_a_broken_included_file_is_told_beside_other_mistakes(tmp_path):
    run = write(tmp_path, run="include: [m.yaml, empty.yaml]\nseed: x\n", m="model: {hidden: 64\n", empty="\n")
    found = problems(run)
    assert [line.splitlines()[0] for line in found] == [
        f"{tmp_path / 'empty.yaml'}: the file is empty",
        f"{tmp_path / 'm.yaml'}:2: is not valid YAML: a bracket that is not closed, in what starts in line 1",
        f"{run}:2: seed is 'x': must be a whole number of at least 0",
    ]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "models/mixtral-8x7b.yaml", "configs/models/mixtral-8x7b.yaml"])
def test_what_comes_with_the_package_is_included_by_name_from_any_folder(tmp_path, name):
    loaded = load(write(tmp_path, run=f"include: [{name}]\nmodel: {{layers: 2}}\n"))
    assert (loaded.config.model.hidden, loaded.config.model.layers) == (4096, 2)
    assert loaded.sources["model.hidden"].startswith(str(shipped.CONFIGS / "models" / "mixtral-8x7b.yaml:"))


def test_a_file_beside_the_including_one_wins_over_a_shipped_one(tmp_path):
    run = write(tmp_path, run="include: models/mixtral-8x7b.yaml\n", **{"models__mixtral-8x7b": MODEL})
    assert load(run).config.model.hidden == 64


def test_a_misspelt_shipped_name_is_suggested(tmp_path):
    (problem,) = problems(write(tmp_path, run="include: models/mixtral-8x7.yaml\n" + MODEL))
    assert problem.endswith("remedy: did you mean mixtral-8x7b, which comes with moesys?")
