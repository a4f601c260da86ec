"""Reading values, places, and writing back."""

import dataclasses

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesys.config.load import dump, load, locate
from moesys.config.schema import Config
from moesys.errors import ConfigError, Problem
from moesys.models.parts.mixers.grouped_query import GroupedQueryKeys

MODEL = "model: {hidden: 64, layers: 2, ffn_hidden: 128}\n"
QUICKLY = settings(
    max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("+1.5e+2", 150.0),
        ("3", 3.0),
        ("0x10", 16.0),
        ("010", 10.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2(run, text, value):
    run.write_text(f"{MODEL}train: {{optimizer: {{lr: {text}}}}}")
    assert load(run).config.train.optimizer.lr == value


@pytest.mark.parametrize("text", ["yes", "on", "no", "04:00:00", "2026-11-20", "1e", "=", "0o8", "12_3", "<<"])
def test_other_words_are_text(run, text):
    run.write_text(f"{MODEL}data: {{path: {text}}}")
    assert load(run).config.data.path == text


@pytest.mark.parametrize(
    ("text", "value"), [("!!str 5", "5"), ("'5'", "5"), ("|\n  a\n  b\n", "a\nb\n"), ("&x ü", "ü")]
)
def test_text_in_all_its_forms(run, text, value):
    run.write_text(f"{MODEL}data:\n path: {text}\n")
    assert load(run).config.data.path == value


def test_anchors_carry_values(run):
    run.write_text("seed: &n 3\nmodel: {hidden: 64, layers: *n, ffn_hidden: 8}\n")
    assert load(run).config.model.layers == 3


def test_a_byte_order_mark_and_windows_lines(run):
    run.write_bytes(b"\xef\xbb\xbf" + MODEL.encode() + b"seed: 1\r\ntrain:\r\n  steps: 2\r\n")
    loaded = load(run)
    assert loaded.config.train.steps == 2 and loaded.sources["train.steps"] == f"{run}:4"


@pytest.mark.parametrize(
    ("file", "name"), [("mixtral-8x7b", "mixtral-8x7b"), ("my run (2)", "my-run-2"), ("v1.2", "v1.2"), ("ü", "run")]
)
def test_the_name_is_the_files(tmp_path, file, name):
    path = tmp_path / f"{file}.yaml"
    path.write_text(MODEL)
    assert load(path).config.name == name


def test_a_given_name_stays(run):
    run.write_text(MODEL + "name: other")
    assert load(run).config.name == "other"


def test_empty_sections_are_default(run):
    run.write_text(MODEL + "train:\nparallel:\n# tp: 2\nlaunch: {env: }\n")
    assert load(run).config == Config.model_validate(
        {"name": "run", "model": {"hidden": 64, "layers": 2, "ffn_hidden": 128}}
    )


def test_loaded_is_frozen(run):
    run.write_text(MODEL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(run).config = None


def test_problems_of_other_floors_get_place_and_value(run):
    run.write_text(MODEL + "parallel:\n  tp: 3\n  sp: true\ncluster: {device: cpu}\n")
    loaded = load(run, ["model.attention.kv_heads=3"])
    asked = [
        Problem("parallel.tp", "must divide 64", "another tp"),
        Problem("parallel.pp_schedule", "cannot be"),
        Problem("parallel.sp", "cannot be"),
        Problem("model.attention.kv_heads", "must divide 4"),
        Problem("data.path", "is needed"),
        Problem("train.schedule", "cannot be"),
        Problem("parallel.tp", "keeps what it has", given="9", where="elsewhere:1"),
    ]
    assert [str(p) for p in locate(asked, loaded.sources, loaded.config)] == [
        f"{run}:3: parallel.tp is 3: must divide 64\n    remedy: another tp",
        f"{run}:2: parallel.pp_schedule is '1f1b' (the default): cannot be",
        f"{run}:4: parallel.sp is true: cannot be",
        "command line 'model.attention.kv_heads=3': model.attention.kv_heads is 3: must divide 4",
        f"{run}: data.path: is needed",
        f"{run}: train.schedule: cannot be",
        "elsewhere:1: parallel.tp is 9: keeps what it has",
    ]


def test_problems_are_located_without_the_configuration_too(run):
    run.write_text(MODEL + "seed: 1")
    assert str(locate([Problem("seed", "x")], load(run).sources)[0]) == f"{run}:2: seed: x"


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))  # no halves of characters, no NUL


@QUICKLY
@given(
    st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True), TEXT),
    st.lists(TEXT),
    st.floats(1e-300, 1e300),
    st.booleans(),
)
def test_whatever_is_written_is_read_back(tmp_path, env, freeze, lr, sp):
    raw = {"name": "x", "model": {"hidden": 4, "layers": 1}, "launch": {"env": env}}
    config = Config.model_validate(
        {**raw, "train": {"optimizer": {"lr": lr}, "freeze": freeze}, "parallel": {"sp": sp, "pp_split": [1]}}
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path).config == config


def test_what_is_written_means_the_same_to_yaml_1_1(run):
    env = {
        "A": "yes",
        "B": "04:00:00",
        "C": "1e-4",
        "D": "1_000",
        "E": "0o7",
        "F": "null",
        "G": "12:30",
        "H": "2026-01-01",
    }
    config = Config.model_validate({"model": {"hidden": 4, "layers": 1}, "launch": {"env": env}})
    its_keys = GroupedQueryKeys().model_dump()
    assert yaml.safe_load(dump(config)) == {
        **config.model_dump(),
        "model": {**config.model.model_dump(), "attention": {"kind": "gqa", **its_keys}},
        "train": {
            **config.train.model_dump(),
            "optimizer": {**config.train.optimizer.model_dump(), "betas": [0.9, 0.95]},
        },
    }


YAML = st.recursive(
    st.sampled_from(["1", "0", "-3", "1e9", ".nan", "yes", "null", "''", "auto", "x", "*a", "!!set", "- 1", "@", "\t"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda v: f"[{', '.join(v)}]")
        | st.dictionaries(
            st.sampled_from(["tp", "moe", "include", "kind", "<<", "lr", "env", "?"]), inner, max_size=3
        ).map(lambda v: "{" + ", ".join(f"{k}: {w}" for k, w in v.items()) + "}")
    ),
    max_leaves=6,
)
SECTIONS = st.sampled_from(["include", "name", "seed", "model", "parallel", "train", "data", "launch", "output", "x"])


@QUICKLY
@given(st.lists(st.tuples(SECTIONS, YAML), max_size=5), st.lists(st.text(max_size=12), max_size=2))
def test_no_input_ends_in_anything_but_a_configuration_error(tmp_path, lines, overrides):
    path = tmp_path / "run.yaml"
    path.write_text(MODEL + "\n".join(f"{key}: {value}" for key, value in lines))
    try:
        load(path, overrides)
    except ConfigError as error:
        assert error.problems and all(p.where for p in error.problems)
