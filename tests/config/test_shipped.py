"""The configurations that come with the package."""

from pathlib import Path

import jsonschema
import pytest

from moesys.config.load import dump, json_schema, load
from moesys.config.read import read_file
from moesys.config.write import json_schema_of_sweeps
from moesys.parallel import dimension

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
CLUSTERS = sorted((CONFIGS / "clusters").glob("*.yaml"))
RECIPES = sorted(CONFIGS.glob("*.yaml"))


def ids(path):
    return path.stem


@pytest.mark.parametrize("path", MODELS + RECIPES, ids=ids)
def test_written_and_read_again_it_is_the_same(path, tmp_path):
    config = load(path).config
    assert config.name == path.stem
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(config))
    assert load(copy).config == config


@pytest.mark.parametrize("path", MODELS + CLUSTERS + RECIPES, ids=ids)
def test_its_first_line_says_what_it_is(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", CLUSTERS, ids=ids)
def test_a_cluster_completes_a_model(path, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"include: [{CONFIGS / 'models' / 'mixtral-8x7b.yaml'}, {path}]\n")
    assert load(run).config.cluster.ranks_per_node in (4, 8)


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipes_are_legal(path):
    assert dimension.check(load(path).config) == []


@pytest.mark.parametrize("path", MODELS + CLUSTERS + RECIPES, ids=ids)
def test_it_is_valid_for_editors(path):
    problems = []
    jsonschema.validate(read_file(path, problems).plain(), json_schema())
    assert problems == []


def test_the_schema_is_one_and_describes_every_key():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["include"]["description"]
    assert schema["$defs"]["ParallelConfig"]["properties"]["tp"]["description"].startswith("Tensor parallelism")
    _, gate = schema["$defs"]["GateConfig"]["anyOf"]
    assert gate["properties"]["slots"]["description"] == "soft: Slots per expert and sequence."
    assert "required" not in schema and "title" not in schema["properties"]["seed"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"parallel": {"tpp": 2}},
        {"parallel": {"tp": 0}},
        {"train": {"optimizer": {"betas": [1]}}},
        {"include": 3},
        {"x": 1},
        {"model": {"moe": {"gate": "topk"}}},
        {"model": {"layers": 10**9}},
    ],
)
def test_editors_see_mistakes(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema())


@pytest.mark.parametrize("legal", [{"model": {"moe": {"gate": "hash"}}}, {"parallel": {"dispatch": "all_gather"}}])
def test_a_word_for_a_section_is_valid_for_editors(legal):
    jsonschema.validate(legal, json_schema())


def test_what_editors_say_of_experts_is_about_experts():
    """Editors show what is wrong with the first alternative, or the best match: null must not come first."""
    wrong = {"model": {"moe": {"experts": "x"}}}
    schema = json_schema()
    assert list(schema["$defs"]["ModelConfig"]["properties"]["moe"]["anyOf"][-1].items()) == [("type", "null")]
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(wrong))
    assert list(error.absolute_path) == ["model", "moe", "experts"] and "integer" in error.message


def test_sweeps_have_a_schema_of_their_own():
    schema = json_schema_of_sweeps()
    jsonschema.Draft202012Validator.check_schema(schema)
    sweep = CONFIGS / "sweeps" / "gates.yaml"
    whole = read_file(sweep, []).plain()
    jsonschema.validate(whole, schema)
    for wrong in (
        {"runs": {}},
        {"base": "x"},
        {"base": "x", "runs": {"a": [1]}},
        {"base": "x", "runs": {}, "rums": {}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
