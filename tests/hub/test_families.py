"""Every family of released models against transformers: logits, loss, every gradient, and config.json both ways."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import released_models as released
import torch
from released_models import CASES, Case
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesys.config.schema import Config, ModelConfig
from moesys.hub.derived import Derived
from moesys.hub.family import Family, families, meant, nested
from moesys.hub.fit import fit
from moesys.hub.folder import Folder, open_folder
from moesys.hub.mapping import sizes, whole
from moesys.hub.tensors import FolderTensors
from moesys.hub.weights import ReleasedWeights
from moesys.hub.writer import FolderWriter
from moesys.parallel import dimension
from moesys.train.export import Tensors

TOLERANCE = 1e-5
"""Largest difference, relative to the largest number of a tensor."""


@dataclass
class Imported:
    """A model by transformers, its folder, and what moesys reads of it."""

    case: Case
    theirs: Any
    folder: Folder
    family: Family
    derived: Derived

    @property
    def model(self) -> ModelConfig:
        """Our model section."""
        return section(self.derived)


def section(derived: Derived) -> ModelConfig:
    return ModelConfig.model_validate(nested(derived.values))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.id)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Imported]:
    theirs, path = released.build(request.param), tmp_path_factory.mktemp("released")
    released.save(theirs, path)
    folder = open_folder(path)
    family = families()[folder.config["model_type"]]
    derived = family.read(folder.config, folder.tensors)
    assert not derived.problems
    yield Imported(request.param, theirs, folder, family, derived)


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    scale = theirs.abs().max().item()
    assert scale > 0, f"{what} is all zero"
    assert (ours - theirs).abs().max().item() <= TOLERANCE * scale, what


def gradients(theirs: nn.Module, case: Case, path: Path) -> Folder:
    """A folder with the gradients of transformers' model in place of its weights, by its own names and orders."""
    twin = released.build(case)
    mine = dict(twin.named_parameters())
    with torch.no_grad():
        for tensor in twin.buffers():
            tensor.zero_()
        for name, parameter in theirs.named_parameters():
            mine[name].copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    released.save(twin, path)
    return open_folder(path)


def test_logits_loss_and_every_gradient_are_those_of_transformers(imported: Imported, tmp_path: Path) -> None:
    model, tokens = imported.model, released.tokens()
    fitting = fit(imported.folder, model, released.VOCAB)
    ours = released.filled(fitting, model)
    logits = ours(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    theirs = imported.theirs(tokens, labels=tokens)
    theirs.loss.backward()
    assert len({tensor.file for tensor in imported.folder.tensors.values()}) > 1
    close(logits, theirs.logits, "logits")
    close(loss, theirs.loss, "loss")
    source = ReleasedWeights(fit(gradients(imported.theirs, imported.case, tmp_path), model, released.VOCAB))
    for name, parameter in ours.named_parameters():
        wanted = torch.empty_like(parameter)
        source.read_into(wanted, name, whole(parameter.shape))
        assert parameter.grad is not None, name
        close(parameter.grad, wanted, name)


def test_what_is_written_is_what_was_read_and_transformers_loads_it(imported: Imported, tmp_path: Path) -> None:
    family, model, to = imported.family, imported.model, tmp_path / "written"
    fitting = fit(imported.folder, model, released.VOCAB)
    weights = released.InMemory(released.filled(fitting, model).state_dict())
    tensors = Tensors(family, model, weights, torch.float32, 4000)
    with FolderWriter(to, list(tensors.planned()), 12000) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish(family.write(model), {}, {})
    before, after = FolderTensors(imported.folder), FolderTensors(open_folder(to))
    assert after.folder.tensors.keys() == imported.folder.tensors.keys() - set(fitting.left_out)
    for name, tensor in after.folder.tensors.items():
        everything = (None,) * len(tensor.shape)
        assert before.read(name, everything).numpy().tobytes() == after.read(name, everything).numpy().tobytes(), name
    loaded, report = AutoModelForCausalLM.from_pretrained(
        to, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(report.values()), report
    close(loaded.eval()(released.tokens()).logits, imported.theirs(released.tokens()).logits, "logits")


def test_any_part_of_a_weight_is_read_as_it_lies_in_the_whole(imported: Imported) -> None:
    fitting = fit(imported.folder, imported.model, released.VOCAB)
    source, draw = ReleasedWeights(fitting), Random(0)
    for weight in imported.family.weights(imported.model, released.VOCAB):
        everything = torch.empty(weight.shape)
        source.read_into(everything, weight.name, whole(weight.shape))
        box = tuple((draw.randrange(size), size) for size in weight.shape)
        box = tuple((start, draw.randint(start + 1, stop)) for start, stop in box)
        part = torch.empty(sizes(box))
        source.read_into(part, weight.name, box)
        assert torch.equal(part, everything[tuple(slice(*ends) for ends in box)]), weight.name


def test_the_model_section_breaks_no_rule(imported: Imported) -> None:
    config = Config.model_validate({"model": nested(imported.derived.values), "train": {"seq_len": 16}})
    assert dimension.check(config) == []


def test_config_is_read_as_it_is_written(imported: Imported) -> None:
    family, model = imported.family, imported.model
    assert family.differences(model) == []
    back = family.read(family.write(model))
    assert not back.problems
    assert meant(section(back)) == meant(model)


NOT_OF_THE_MODEL = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "max_position_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "eod_token_id", "sep_token_id", "_name_or_path"),
    *("pretraining_tp", "max_window_layers", "id2label", "label2id", "output_router_logits", "chunk_size_feed_forward"),
}
"""Keys of config.json that moesys does not write, or not as they were, and that change no number."""


THE_SAME = {"n_group": (None, 1), "topk_group": (None, 1), "num_nextn_predict_layers": (1, 0)}
"""Values that mean the same in these folders: one group is none, and no file has blocks of multi-token prediction."""


def test_transformers_reads_the_written_config_as_the_original(imported: Imported) -> None:
    original = imported.theirs.config.to_dict()
    written = CONFIG_MAPPING[imported.case.family].from_dict(imported.family.write(imported.model)).to_dict()
    rotary = original["rope_parameters"]
    written["rope_parameters"] = {key: written["rope_parameters"].get(key) for key in rotary}
    differ = {key: (value, written.get(key)) for key, value in original.items() if written.get(key) != value}
    assert {k: p for k, p in differ.items() if k not in NOT_OF_THE_MODEL and p != THE_SAME.get(k)} == {}


def test_older_files_say_the_same_of_rotary_positions(imported: Imported) -> None:
    raw = dict(imported.folder.config)
    new = dict(raw.pop("rope_parameters"))
    share, kind = new.pop("partial_rotary_factor", None), new.pop("rope_type")
    raw["rope_theta"] = new.pop("rope_theta")
    raw |= {} if share is None else {"partial_rotary_factor": share}
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **new}
    assert imported.family.read(raw, imported.folder.tensors).values == imported.derived.values


@pytest.mark.parametrize("kind", sorted({family.kind for family in families().values()}))
def test_absent_keys_mean_what_they_mean_to_transformers(kind: str) -> None:
    family = families()[kind]
    full = CONFIG_MAPPING[kind](hidden_size=960, num_attention_heads=12).to_dict()
    needed = {key.theirs: full[key.theirs] or 4 for key in family.fields if key.required}
    needed |= {"model_type": kind, "num_hidden_layers": full["num_hidden_layers"]}
    said, unsaid = family.read(full | needed, tensors=()), family.read(needed, tensors=())
    assert not said.problems
    assert meant(section(unsaid)) == meant(section(said))


def test_every_family_says_what_it_cannot_hold_of_every_other_familys_model(imported: Imported) -> None:
    for kind, family in families().items():
        lacks = family.differences(imported.model)
        assert lacks == [] or all(line.startswith(("model.", kind)) or ": " in line for line in lacks)


def test_a_base_stretched_by_alpha_is_that_of_transformers(tmp_path: Path) -> None:
    alpha = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0}
    case = next(case for case in CASES if case.family == "hunyuan_v1_moe")
    theirs = released.build(Case(case.family, case.config | {"rope_parameters": alpha}))
    released.save(theirs, tmp_path)
    folder = open_folder(tmp_path)
    model = section(families()[case.family].read(folder.config))
    ours = released.filled(fit(folder, model, released.VOCAB), model)
    close(ours(released.tokens()), theirs(released.tokens()).logits, "logits")


def test_older_moe_files_are_read_with_lists_and_other_names() -> None:
    hunyuan = {
        **{"model_type": "hunyuan_v1_moe", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 24},
        **{
            "num_experts": 4,
            "moe_topk": [2, 2, 2],
            "moe_intermediate_size": [24, 24, 24],
            "num_shared_expert": [1, 1, 1],
        },
        **{"rope_theta": 10000.0, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
        **{"use_qk_norm": True, "use_mixed_mlp_moe": True, "use_cla": False, "cla_share_factor": 2},
    }
    found = families()["hunyuan_v1_moe"].read(hunyuan)
    assert not found.problems
    assert found.values["moe.top_k"] == 2
    assert found.values["rope_theta"] == pytest.approx(10000.0 * 1000.0 ** (12 / 10))
    assert "rope_scaling" not in found.values
    minimax = families()["minimax_m2"].read(
        {
            **{"model_type": "minimax_m2", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 24},
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 6, "attn_type_list": [1, 1, 1]},
            **{"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True, "num_mtp_modules": 3},
            **{"use_mtp": True, "qk_norm_type": "per_layer", "mlp_intermediate_size": 64},
        }
    )
    assert not minimax.problems
    assert minimax.values["attention.rotary_fraction"] == 0.5
    gpt_oss = families()["gpt_oss"].read(
        {
            **{"model_type": "gpt_oss", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 24},
            **{
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "experts_per_token": 2,
                "initial_context_length": 4096,
            },
            **{"swiglu_limit": 7.0, "rope_theta": 150000, "sliding_window": 128},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_scaling": {
                **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False},
                "original_max_position_embeddings": 4096,
            },
        }
    )
    assert not gpt_oss.problems
    assert gpt_oss.values["layers.repeat"] == ["local moe", "attention moe"]
    assert gpt_oss.values["mixers.local.window"] == 128
    assert gpt_oss.values["rope_scaling"]["truncate"] is False
