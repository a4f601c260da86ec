"""`key.sub=value` of the command line."""

import pytest

from moesys.config.load import load
from moesys.errors import ConfigError


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {hidden: 64, layers: 2, moe: {experts: 4, ffn_hidden: 8}}\ntrain: {steps: 5}\n")
    return path


def problem(run, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(run, overrides)
    (found,) = caught.value.problems
    return str(found)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=10", "train.steps", 10),
        ("train.optimizer.lr=1e-4", "train.optimizer.lr", 1e-4),
        ("train.optimizer.lr=1", "train.optimizer.lr", 1.0),
        ("train.optimizer.betas=[0.8, 0.9]", "train.optimizer.betas", (0.8, 0.9)),
        ("train.optimizer.clip=null", "train.optimizer.clip", None),
        ("train.optimizer.clip=", "train.optimizer.clip", None),
        ("parallel.sp=false", "parallel.sp", False),
        ("parallel.dp=2", "parallel.dp", 2),
        ("parallel.dp=auto", "parallel.dp", "auto"),
        ("model.moe.top_k=1", "model.moe.top_k", 1),
        ("model.moe=null", "model.moe", None),
        ("data.path=a=b", "data.path", "a=b"),
        ('data.path="7"', "data.path", "7"),
        ("launch.slurm={time: 04:00:00}", "launch.slurm", {"time": "04:00:00"}),
        ("launch.env.NCCL_DEBUG=INFO", "launch.env", {"NCCL_DEBUG": "INFO"}),
        ("name=other", "name", "other"),
    ],
)
def test_an_override_wins_and_is_parsed_as_yaml(run, override, key, value):
    loaded = load(run, [override])
    found = loaded.config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    assert loaded.sources[override.partition("=")[0]] == f"command line {override!r}"


def test_a_mapping_is_merged_into_its_section(run):
    loaded = load(run, ["train={seq_len: 8}", "train.micro_batch=2", "train.micro_batch=4"])
    train = loaded.config.train
    assert (train.steps, train.seq_len, train.micro_batch) == (5, 8, 4)
    assert loaded.sources["train.steps"] == f"{run}:2"
    assert loaded.sources["train.micro_batch"] == "command line 'train.micro_batch=4'"


def test_an_override_keeps_the_place_of_its_section(run):
    assert load(run, ["train.seq_len=8"]).sources["train"] == f"{run}:2"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=two", "train.steps is 'two': must be a whole number of at least 1"),
        ("parallel.dp=-1", "parallel.dp is -1: must be a whole number of at least 1, or auto"),
        ("train.steps", "is no override\n    remedy: write key.sub=value, such as train.steps=10"),
        ("=5", "is no override\n    remedy: write key.sub=value, such as train.steps=10"),
        ("train..steps=5", "is no override\n    remedy: write key.sub=value, such as train.steps=10"),
        ("include=a.yaml", "include: cannot be set here\n    remedy: include it in the file"),
        ("seed.x=1", "seed is {x: 1}: must be a whole number of at least 0"),
        (
            "parallel.pp_split=[1",
            "is not valid YAML: a bracket that is not closed\n    remedy: close it, or separate its parts by commas",
        ),
        (
            "launch.env.DEBUG=1",
            'launch.env.DEBUG is 1: must be text\n    remedy: put it in quotes: "1"',
        ),
    ],
)
def test_a_wrong_override_is_named(run, override, expected):
    assert problem(run, override) == f"command line {override!r}: {expected}"


def test_a_misspelt_override(run):
    text = problem(run, "train.step=5")
    assert text.startswith("command line 'train.step=5': train.step: unknown key; section train has steps, ")
    assert text.endswith("remedy: did you mean train.steps?")


@pytest.mark.parametrize("text", ["train: {steps: 5, steps: 6}\nmodel: {hidden: 64, layers: 2}", "train: [", ""])
def test_a_wrong_override_is_told_beside_what_is_wrong_with_the_file(run, text):
    run.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(run, ["train.steps=two"])
    file, command = map(str, caught.value.problems)
    assert command == "command line 'train.steps=two': train.steps is 'two': must be a whole number of at least 1"
    assert file.startswith(str(run))


def test_a_right_override_hides_a_wrong_value(run):
    run.write_text(run.read_text().replace("steps: 5", "steps: two"))
    assert load(run, ["train.steps=3"]).config.train.steps == 3


def test_an_override_can_complete_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {hidden: 64}")
    assert load(path, ["model.layers=2"]).config.model.layers == 2
