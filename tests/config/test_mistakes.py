"""Every kind of mistake in YAML, and the one message that it gets."""

from pathlib import Path

import pytest

from moesys.config.load import load
from moesys.errors import ConfigError

MODEL = "model: {hidden: 64, layers: 2, ffn_hidden: 128}\n"
SECTIONS = "name, seed, engine, model, parallel, train, data, cluster, launch, output, measure"
PARALLEL = "dp, dp_shard, sync_gradients, tp, sp, pp, pp_schedule, pp_virtual, pp_split, cp, ep, etp, dispatch"
OPTIMIZER = "kind, lr, betas, eps, weight_decay, clip"

# (what, lines after MODEL, so the first is line 2, the message)
VALUES = [
    ("text for a whole number", "parallel: {tp: two}", "2: parallel.tp is 'two': must be a whole number of at least 1"),
    ("zero", "parallel: {tp: 0}", "2: parallel.tp is 0: must be a whole number of at least 1"),
    ("negative", "seed: -1", "2: seed is -1: must be a whole number of at least 0"),
    (
        "a fraction for a whole number",
        "train: {steps: 1.5}",
        "2: train.steps is 1.5: must be a whole number of at least 1",
    ),
    (
        "an exponent for a whole number",
        "train:\n\n  steps: 1e3",
        "4: train.steps is 1e3: must be a whole number of at least 1\n    remedy: write 1000",
    ),
    (
        "underscores",
        "train: {steps: 1_000}",
        "2: train.steps is '1_000': must be a whole number of at least 1\n    remedy: write 1000, without quotes",
    ),
    (
        "a number in quotes",
        'train: {optimizer: {lr: "3e-4"}}',
        "2: train.optimizer.lr is '3e-4': must be a number above 0\n    remedy: write 3e-4, without quotes",
    ),
    ("true for a number", "cluster: {nodes: true}", "2: cluster.nodes is true: must be a whole number of at least 1"),
    ("infinite", "train: {optimizer: {lr: .inf}}", "2: train.optimizer.lr is .inf: must be a finite number above 0"),
    (
        "not a number",
        "train: {optimizer: {lr: .nan}}",
        "2: train.optimizer.lr is .nan: must be a finite number above 0",
    ),
    ("a union", "parallel: {dp: none}", "2: parallel.dp is 'none': must be a whole number of at least 1, or auto"),
    (
        "a union's number",
        "parallel: {dp_shard: 0}",
        "2: parallel.dp_shard is 0: must be a whole number of at least 1, or full",
    ),
    (
        "a list in a union",
        "parallel: {pp_split: [4, 0]}",
        "2: parallel.pp_split is [4, 0]: must be a list of whole numbers of at least 1, or auto",
    ),
    (
        "a list for a number",
        "parallel: {pp: [2]}",
        "2: parallel.pp is [2]: must be a whole number of at least 1",
    ),
    (
        "a misspelt word",
        "parallel: {pp_schedule: 1F1B}",
        "2: parallel.pp_schedule is '1F1B': must be one of gpipe, 1f1b, interleaved-1f1b, zero-bubble\n"
        "    remedy: did you mean 1f1b?",
    ),
    (
        "a short name of a type",
        "train: {dtype: fp32}",
        "2: train.dtype is 'fp32': must be float32 or bfloat16\n    remedy: did you mean float32?",
    ),
    (
        "another word",
        "data: {kind: web}",
        "2: data.kind is 'web': must be one of python-stdlib, text, huggingface, megatron",
    ),
    ("yes", "parallel: {sp: yes}", "2: parallel.sp is 'yes': must be true or false\n    remedy: write true"),
    ("off", "train: {compile: off}", "2: train.compile is 'off': must be true or false\n    remedy: write false"),
    ("one for true", "train: {compile: 1}", "2: train.compile is 1: must be true or false"),
    (
        "none for null",
        "train: {optimizer: {clip: none}}",
        "2: train.optimizer.clip is 'none': must be a number above 0, or null\n    remedy: write null",
    ),
    ("null", "train: {steps: }", "2: train.steps is empty: must be a whole number of at least 1"),
    ("a bound", "data: {heldout: 1}", "2: data.heldout is 1: must be a number above 0 and below 1"),
    ("a range", "train: {schedule: {min_ratio: 2}}", "2: train.schedule.min_ratio is 2: must be a number from 0 to 1"),
    (
        "a pair of one",
        "train: {optimizer: {betas: [0.9]}}",
        "2: train.optimizer.betas is [0.9]: must be a list of 2 numbers of at least 0 and below 1",
    ),
    (
        "a pair out of bounds",
        "train: {optimizer: {betas: [0.9, 1.0]}}",
        "2: train.optimizer.betas is [0.9, 1.0]: must be a list of 2 numbers of at least 0 and below 1",
    ),
    (
        "a number for text",
        "launch: {env: {OMP_NUM_THREADS: 1}}",
        '2: launch.env.OMP_NUM_THREADS is 1: must be text\n    remedy: put it in quotes: "1"',
    ),
    ("text for a mapping", "launch: {env: A=1}", "2: launch.env is 'A=1': must be a mapping of names to text"),
    (
        "a number for a section",
        "train: {optimizer: 3}",
        f"2: train.optimizer is 3: must be a section with the keys {OPTIMIZER}",
    ),
    (
        "a bad name",
        "name: a/b",
        "2: name is 'a/b': must be text of letters, digits, dots, dashes and underscores, the first a letter or digit",
    ),
    (
        "a long value",
        f"parallel: {{tp: {'x' * 99}}}",
        f"2: parallel.tp is '{'x' * 56}...: must be a whole number of at least 1",
    ),
]

KEYS = [
    (
        "a misspelt key",
        "parallel:\n  tpp: 2",
        f"3: parallel.tpp: unknown key; section parallel has {PARALLEL}\n    remedy: did you mean parallel.tp?",
    ),
    (
        "a misspelt section",
        "paralel: {tp: 2}",
        f"2: paralel: unknown key; a configuration has {SECTIONS}\n    remedy: did you mean parallel?",
    ),
    (
        "a key of another section",
        "lr: 1e-3",
        f"2: lr: unknown key; a configuration has {SECTIONS}\n    remedy: did you mean train.optimizer.lr?",
    ),
    (
        "another system's name",
        "parallel: {expert_model_parallel_size: 8}",
        f"2: parallel.expert_model_parallel_size: unknown key; section parallel has {PARALLEL}\n"
        "    remedy: did you mean parallel.ep?",
    ),
    (
        "dashes",
        "parallel: {pp-schedule: gpipe}",
        f"2: parallel.pp-schedule: unknown key; section parallel has {PARALLEL}\n"
        "    remedy: did you mean parallel.pp_schedule?",
    ),
    (
        "a part of a key",
        "train: {optimizer: {decay: 0.1}}",
        f"2: train.optimizer.decay: unknown key; section train.optimizer has {OPTIMIZER}\n"
        "    remedy: did you mean train.optimizer.weight_decay or train.schedule.decay?",
    ),
    (
        "nothing like it",
        "parallel: {qqq: 1}",
        f"2: parallel.qqq: unknown key; section parallel has {PARALLEL}\n    remedy: remove it",
    ),
    (
        "dots in a file",
        "train.steps: 5",
        "2: train.steps: dots separate keys on the command line only\n    remedy: write train: {steps: ...}",
    ),
    (
        "include in a section",
        "parallel: {include: tp.yaml}",
        "2: parallel.include: stands at the top of a file only\n    remedy: move it out of the section",
    ),
    (
        "twice",
        "seed: 1\nseed: 2",
        "3: seed: is given twice, first at {file}:2\n    remedy: keep one of them",
    ),
    (
        "twice in a section",
        "train:\n  steps: 1\n  seq_len: 4\n  steps: 2",
        "5: train.steps: is given twice, first at {file}:3\n    remedy: keep one of them",
    ),
    (
        "a merge key",
        "train: {<<: {steps: 2}}",
        "2: train.<<: merging by << is not supported\n    remedy: use include, or repeat the keys",
    ),
    (
        "a list as a key",
        "train: {[a]: 2}",
        "2: train: has a key that is not a plain word\n    remedy: quote text that starts with { or [",
    ),
    (
        "a tag",
        "seed: !!python/name:os.system ''",
        "2: seed: cannot have the tag !!python/name:os.system here\n    remedy: remove the tag",
    ),
    ("a tag that does not fit", "seed: !!int x", "2: seed: cannot have the tag !!int here\n    remedy: remove the tag"),
    (
        "a circle",
        "parallel: &p {pp_split: [*p]}",
        "2: parallel.pp_split: contains itself through its anchor\n    remedy: remove the alias",
    ),
]

SYNTAX = [
    (
        "a tab",
        "train:\n\tsteps: 5",
        "3: is not valid YAML: a tab where spaces are needed\n    remedy: indent with spaces",
    ),
    (
        "a second colon",
        "data: path: x",
        "2: is not valid YAML: a colon where no key can be\n    remedy: check the indentation, or quote text with ': '",
    ),
    (
        "no colon",
        "train\nseed: 1",
        "3: is not valid YAML: a key without its colon, in what starts in line 2\n"
        "    remedy: write key: value, here or in the line before",
    ),
    (
        "an odd column",
        "train:\n    steps: 5\n  seq_len: 4",
        "4: is not valid YAML: a line in a column of its own, in what starts in line 1\n"
        "    remedy: start the keys of a section in one column",
    ),
    (
        "an open bracket",
        "parallel: {tp: 2\nseed: 1",
        "3: is not valid YAML: a bracket that is not closed, in what starts in line 2\n"
        "    remedy: close it, or separate its parts by commas",
    ),
    (
        "open quotes",
        "name: 'x\nseed: 1\n",
        "4: is not valid YAML: quotes that are not closed, in what starts in line 2\n    remedy: close the quotes",
    ),
    (
        "a special character",
        "name: @x",
        "2: is not valid YAML: text that starts with a special character\n    remedy: put it in quotes",
    ),
    (
        "a star",
        "name: *x",
        "2: is not valid YAML: a word that starts with *\n    remedy: put it in quotes",
    ),
    (
        "a second document",
        "---\nseed: 1",
        "2: is not valid YAML: a second document, in what starts in line 1\n    remedy: keep one: remove the line ---",
    ),
    ("a control character", "seed: 1\nname: \x07", "3: is not valid YAML: a control character"),
    ("a deep nest", "name: " + "[" * 1000, "1: is not valid YAML: nested too deeply"),
]


def message(path: Path, *overrides: str) -> str:
    """The one problem in the configuration at `path`, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    heading, _, text = str(caught.value).partition("\n  ")
    assert heading == "1 problem in the configuration", caught.value
    assert caught.value.exit_code == 2
    assert "pydantic" not in text and "http" not in text
    return text


@pytest.mark.parametrize(
    ("text", "expected"), [t[1:] for t in VALUES + KEYS + SYNTAX], ids=[t[0] for t in VALUES + KEYS + SYNTAX]
)
def test_one_mistake_gets_one_message(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(MODEL + text)
    assert message(path) == f"{path}:{expected.replace('{file}', str(path))}"


MISSING = [
    (
        "a required key",
        "seed: 1\n\nmodel:\n  hidden: 64",
        "3: model.layers: is missing: section model needs it, a whole number of at least 1, "
        "or a section with the keys count, first, repeat\n"
        "    remedy: add layers: to model",
    ),
    (
        "a required key of a section inside",
        "model:\n  hidden: 64\n  layers: 2\n  moe:\n    experts: 4",
        "4: model.moe.ffn_hidden: is missing: section model.moe needs it, a whole number of at least 1\n"
        "    remedy: add ffn_hidden: to model.moe",
    ),
]


@pytest.mark.parametrize(("text", "expected"), [t[1:] for t in MISSING], ids=[t[0] for t in MISSING])
def test_missing_keys_name_their_section(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message(path) == f"{path}:{expected}"


def test_missing_model(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1")
    text = message(path)
    assert text.startswith(f"{path}: model: is missing: needed is a section with the keys vocab_size, hidden, layers")
    assert text.endswith("remedy: write it, or include a file that has it, such as include: models/NAME.yaml")


def test_an_empty_model_section_lacks_its_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n#  hidden: 4\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert [p.key for p in caught.value.problems] == ["model.hidden", "model.layers"]


FILES = [
    ("empty", b"", ": the file is empty\n    remedy: give at least the section model"),
    ("comments alone", b"# nothing\n", ": the file is empty\n    remedy: give at least the section model"),
    ("a list", b"- a\n", ": must hold keys and values, such as `seed: 0`, and holds a list"),
    ("a word", b"hello\n", ": must hold keys and values, such as `seed: 0`, and holds the text 'hello'"),
    (
        "binary",
        b"seed: 1\n\xff\xfe\x00",
        ":2: is not text in UTF-8\n    remedy: save it as UTF-8, or give another file",
    ),
    ("large", b"#" * (2**20 + 1), ": is larger than 1 MiB: this is no configuration"),
]


@pytest.mark.parametrize(("data", "expected"), [t[1:] for t in FILES], ids=[t[0] for t in FILES])
def test_files_that_hold_no_configuration(tmp_path, data, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    assert message(path) == f"{path}{expected}"


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(MODEL)
    path = tmp_path / "quickstrat.yaml"
    assert message(path) == f"{path}: no such file\n    remedy: did you mean {tmp_path / 'quickstart.yaml'}?"


def test_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "nowhere" / "run.yaml"
    assert message(path) == f"{path}: no such file\n    remedy: there is no folder {path.parent}"


def test_a_folder_instead_of_a_file(tmp_path):
    assert message(tmp_path) == f"{tmp_path}: is a folder, not a file\n    remedy: give a YAML file"


def test_a_run_folder_names_its_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(MODEL)
    assert message(tmp_path).endswith(f"remedy: did you mean {tmp_path / 'config.yaml'}?")


def test_a_path_through_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(MODEL)
    path = tmp_path / "run.yaml" / "inner.yaml"
    assert message(path) == f"{path}: cannot be read: Not a directory"


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 3\nseed: -1\ntrain:\n  steps: two\n  dtype: int8\nmodel:\n  hidden: 8\n  moe: {experts: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, ["parallel.tp=x"])
    found = [(p.where.removeprefix(str(path)), p.key) for p in caught.value.problems]
    assert found == [
        (":1", "lr"),
        (":2", "seed"),
        (":4", "train.steps"),
        (":5", "train.dtype"),
        (":6", "model.layers"),
        (":8", "model.moe.ffn_hidden"),
        ("command line 'parallel.tp=x'", "parallel.tp"),
    ]
    assert str(caught.value).startswith("7 problems in the configuration\n")
