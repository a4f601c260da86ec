"""`moesys verify` of experts with biases, LoRA experts, mixes of shared experts, and frozen parameters."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from factors import draw_all_factors
from test_equality import TOLERANCE, Compared, compared, configuration, selected

from moesys.config import Config
from moesys.models.decoder import Decoder
from moesys.parallel import initialise
from moesys.parallel.freeze import frozen_names
from moesys.train import verify

GPT_OSS = {"moe": {"activation": "clipped_swiglu", "bias": True, "gate": {"bias": True}}}
RESIDUAL = {"moe": {"shared_experts": 1, "shared_mix": "residual", "activation": "gelu"}}
# Few tokens per device, and a budget that each may be above or below of: the sign is the micro-batch's.
CONDITIONAL = {"moe": {"shared_experts": 1, "shared_mix": "cmr", "cmr_budget": 0.5, "cmr_loss": 1.0}}
LORA = {"moe": {"lora_rank": 4, "lora_alpha": 8.0}}
ALL_BUT_LORA = ["embed.*", "head.*", "norm.*", "layers.*.attention.*", "layers.*_norm.*"]

CASES = [
    Case("bias-ep-etp", 4, {"ep": 2, "etp": 2}, GPT_OSS),
    Case("residual-tp-ep", 4, {"tp": 2, "ep": 2}, RESIDUAL),
    Case("conditional-cp-ep", 4, {"cp": 2, "ep": 2}, CONDITIONAL),
    Case("lora-shard-ep", 4, {"dp_shard": 2, "ep": 2}, LORA),
    Case("lora-alone-shard-ep", 2, {"dp_shard": "full", "ep": 2}, LORA, {"freeze": ALL_BUT_LORA}),
    # Nothing on the first stage is trained.
    Case("lora-alone-pp-ep", 4, {"pp": 2, "ep": 2}, LORA, {"freeze": [*ALL_BUT_LORA, "layers.[01].*"]}),
]


@pytest.fixture(scope="module")
def mixed(request, small, tmp_path_factory) -> Compared:
    cases = selected(request, "test_equals_one_process")
    whole, low = ([case for case in cases if (case.model is LORA) == lora] for lora in (False, True))
    found = compared(small, whole, tmp_path_factory.mktemp("whole"))
    return found | compared(small, low, tmp_path_factory.mktemp("low"), draw_all_factors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(small, mixed, case, monkeypatch):
    found, expected = mixed[case.name]
    report = verify.compare(found, expected, case.world, TOLERANCE)
    assert report.passed, str(report)
    if case.model is LORA:
        monkeypatch.setattr(initialise, "_fill", initialise._fill)  # restored after the test
        draw_all_factors()
        only_what_is_not_frozen_changed(configuration(small, case), found)


def only_what_is_not_frozen_changed(config: Config, found: verify.Trace) -> None:
    frozen = frozen_names(config.model, config.train.freeze)
    assert set(found.gradients[0]) == set(found.parameters) - frozen
    if config.train.freeze:
        assert all(".experts.fc" in name or ".gate." in name for name in found.gradients[0])
    start = Decoder(config.model, found.parameters["embed.weight"].shape[0])
    initialise.initialise(start, config.seed, config.model.init_std, config.model.tie_embeddings)
    for name, parameter in start.named_parameters():
        assert torch.equal(found.parameters[name], parameter) == (name in frozen), name
