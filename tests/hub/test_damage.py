"""Damaged folders of released models, or of other models: one message that names the tensor and the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import released_models as released
import torch
from safetensors.torch import load_file, save_file

from moesys.config.schema import ModelConfig
from moesys.errors import FileError
from moesys.hub.derive import released as derive
from moesys.hub.family import nested
from moesys.hub.fit import fit
from moesys.hub.folder import INDEX, open_folder

MIXTRAL = next(case for case in released.CASES if case.family == "mixtral")
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    released.save(released.build(MIXTRAL), tmp_path)
    return tmp_path


def index(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def edit(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Rewrite the shard that has the tensor `name`, and the index."""
    file = folder / index(folder)[name]
    tensors = load_file(file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, file)
    entries = {key: value for key, value in index(folder).items() if key in tensors or key not in before}
    entries |= dict.fromkeys(tensors, file.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": entries}))
    return file


def message(folder: Path) -> str:
    """The error of an import, which ends before any weight is read."""
    with pytest.raises(FileError) as caught:
        derived = derive(folder)
        model = ModelConfig.model_validate(nested(derived.derived.values))
        fit(derived.folder, model, released.VOCAB)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_missing_expert(folder: Path) -> None:
    edit(folder, EXPERT, lambda tensors: tensors.__delitem__(EXPERT))
    found = message(folder)
    assert f"{folder} lacks {EXPERT}, which layers.1.ffn.experts.fc1 is filled from" in found


def test_a_missing_expert_that_the_index_names(folder: Path) -> None:
    before = (folder / INDEX).read_text()
    file = edit(folder, EXPERT, lambda tensors: tensors.__delitem__(EXPERT))
    (folder / INDEX).write_text(before)
    assert f"{INDEX} has {EXPERT} in {file.name}, which lacks it" in message(folder)


def test_a_tensor_too_many(folder: Path) -> None:
    extra = "model.layers.1.block_sparse_moe.experts.4.w1.weight"
    file = edit(folder, EXPERT, lambda tensors: tensors.update({extra: tensors[EXPERT].clone()}))
    assert f"{file}: {extra} belongs to no weight of this model" in message(folder)


def test_a_transposed_matrix(folder: Path) -> None:
    file = edit(folder, EXPERT, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].t().contiguous()}))
    wanted = f"{file}: {EXPERT} has the shape [32, 24], and layers.1.ffn.experts.fc1 needs [24, 32]"
    assert wanted in message(folder)


def test_a_wrong_shape(folder: Path) -> None:
    name = "model.norm.weight"
    file = edit(folder, name, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert f"{file}: {name} has the shape [16], and norm.weight needs [32]" in message(folder)


def test_a_tensor_in_two_files(folder: Path) -> None:
    other = folder / "more.safetensors"
    save_file(load_file(folder / index(folder)[EXPERT]), other)
    (folder / INDEX).unlink()
    assert f"is in {index_of(folder, EXPERT)} and in more.safetensors" in message(folder)


def index_of(folder: Path, name: str) -> str:
    return next(file.name for file in sorted(folder.glob("model-*.safetensors")) if name in load_file(file))


@pytest.mark.parametrize("bytes_left", [-1, 40, 4])
def test_a_shard_cut_short(folder: Path, bytes_left: int) -> None:
    file = folder / index(folder)[EXPERT]
    file.write_bytes(file.read_bytes()[:bytes_left])
    assert f"{file} is damaged" in message(folder)


def test_a_shard_whose_end_is_missing_names_its_last_tensor(folder: Path) -> None:
    file = folder / index(folder)[EXPERT]
    content = file.read_bytes()
    last = max(_offsets(content).items(), key=lambda item: item[1])[0]
    file.write_bytes(content[:-10])
    assert f"has {len(content) - 10:,} bytes, and should have {len(content):,}; {last} lies at its end" in message(
        folder
    )


def _offsets(content: bytes) -> dict[str, int]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}


def test_an_index_that_names_a_missing_file(folder: Path) -> None:
    file = folder / index(folder)[EXPERT]
    file.unlink()
    first = next(name for name, shard in index(folder).items() if shard == file.name)
    assert f"{folder}: {file.name}, which holds {first}, is missing" in message(folder)


def reconfigure(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_model_type_that_is_unknown(folder: Path) -> None:
    reconfigure(folder, model_type="mixtrall")
    found = message(folder)
    assert f"{folder}/config.json: model_type is 'mixtrall', and no family has this name" in found
    assert "mixtral" in found


def test_more_blocks_in_config_than_in_files(folder: Path) -> None:
    reconfigure(folder, num_hidden_layers=4)
    assert f"{folder} lacks model.layers.3.input_layernorm.weight" in message(folder)


REFUSED = [
    ("mixtral", {"attention_sink_tokens": 4}, "attention_sink_tokens", "it may change numbers"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act", "is 'gelu', and only 'silu' is followed"),
    ("mixtral", {"attention_dropout": 0.1}, "attention_dropout", "no part drops activations"),
    ("mixtral", {"num_hidden_layers": None}, "num_hidden_layers", "must be the number of blocks"),
    ("mixtral", {"intermediate_size": None}, "intermediate_size", "is missing"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "turn whole heads"),
    ("mixtral", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling", "of the kind 'dynamic'"),
    (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config.quant_method",
        "only fp8 and mxfp4 are decoded",
    ),
    ("llama", {"mlp_bias": True}, "mlp_bias", "only False is followed"),
    (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters",
        "between kinds of layers",
    ),
    ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types", "has linear_attention"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types", "names 1 blocks of 3"),
    ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, "num_experts", "num_local_experts(4)"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method", "'greedy' or 'group_limited_greedy'"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob", "only False is followed"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave", "only True is followed"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq", "only 1 is followed"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit", "only 7.0 is followed"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias", "only False is followed"),
    ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list", "beside 1"),
    ("hunyuan_v1_moe", {"moe_topk": [1, 2, 2]}, "moe_topk", "differs between blocks"),
]


@pytest.mark.parametrize(("kind", "keys", "key", "rule"), REFUSED, ids=[f"{r[0]}-{r[2]}" for r in REFUSED])
def test_what_would_change_numbers_is_refused(kind: str, keys: dict[str, Any], key: str, rule: str) -> None:
    case = next(case for case in released.CASES if case.family == kind)
    raw = {**released.config(case).to_dict(), **keys}
    if "rope_scaling" in keys:
        del raw["rope_parameters"]  # which newer files have instead
    problems = released.family(kind).read(raw).problems
    assert [problem.key for problem in problems] == [key]
    assert rule in problems[0].rule
    assert problems[0].remedy


def test_generation_settings_are_noted() -> None:
    raw = released.config(MIXTRAL).to_dict() | {"temperature": 0.7, "do_sample": True}
    found = released.family("mixtral").read(raw)
    assert not found.problems
    assert found.notes == ["generation settings, which training has not: do_sample, temperature"]


def test_a_folder_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"has no config\.json"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(released.config(MIXTRAL).to_dict(), default=str))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileError, match=r"has no \.safetensors file; \.bin files are pickles"):
        _ = open_folder(tmp_path).tensors
