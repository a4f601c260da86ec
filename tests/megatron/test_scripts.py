"""The lines of docs/megatron.md, run where a training script of Megatron-LM runs them.

The scripts are not in the package megatron-core. What they call is defined here with the signatures it has there, and
does with its arguments what it does there: `pretrain_gpt.py`, `model_provider.py` and `megatron/training/training.py`
(`pretrain`, `get_model`) of Megatron-LM core_v0.16.1 and core_v0.19.0.
"""

from __future__ import annotations

import re
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_sides import SEQUENCE, VOCABULARY, megatron, run, transformer_config

from moesys.megatron.layer import MoESysLayer
from moesys.megatron.objective import version

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/megatron.md").read_text(), re.DOTALL)

FLAGS = ["--moesys-gate", "sinkhorn", "--moesys-dispatch", "all_gather"]


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with megatron():
            yield
    finally:
        dist.destroy_process_group()


def parsed(extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None) -> Namespace:
    """Megatron's flags that a builder reads, and those of `extra_args_provider`."""
    parser = ArgumentParser()
    given = (extra_args_provider or (lambda p: p))(parser).parse_args(FLAGS)
    return Namespace(
        **vars(given), padded_vocab_size=VOCABULARY, max_position_embeddings=SEQUENCE, fp16_lm_cross_entropy=False,
        untie_embeddings_and_output_weights=False, position_embedding_type="learned_absolute", rotary_percent=1.0,
        rotary_base=10000, use_rope_scaling=False,
    )  # fmt: skip


def executed(block: str, **names: Any) -> Any:
    """What the block's call of `pretrain` returned."""
    found: list[Any] = []
    pretrain = names.pop("pretrain")

    def called(*arguments: Any, **more: Any) -> None:
        found.append(pretrain(*arguments, **more))

    common = {
        "train_valid_test_datasets_provider": None, "forward_step": None, "store": None, "get_embedding_ranks": None,
        "ModelType": SimpleNamespace(encoder_or_decoder=1), "partial": partial, "pretrain": called,
    }  # fmt: skip
    exec(block, common | names)
    return found[0]


def trains(model: torch.nn.Module, layers: int) -> None:
    """Its MoE layers are the plug-in's, with the options of the flags, and backward reaches them."""
    plugged = [module for module in model.modules() if isinstance(module, MoESysLayer)]
    assert len(plugged) == layers
    run(model)
    for layer in plugged:
        assert type(layer.moe.gate).__name__ == "SinkhornGate"
        assert layer.moe.gate.projection.weight.grad.abs().sum() > 0


def get_model(provider: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """`get_model` of training.py, with one stage."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    return provider(pre_process=True, post_process=True, config=None, pg_collection=groups)


@pytest.mark.parametrize(("options", "layers"), [({}, 2), ({"moe_layer_freq": [0, 1]}, 1), ({"mtp_num_layers": 1}, 3)])
def test_the_lines_for_core_v0_16_1(options: dict[str, Any], layers: int) -> None:
    from megatron.core.models.gpt import GPTModel

    args: list[Namespace] = []

    def pretrain(
        train_valid_test_dataset_provider, model_provider, model_type, forward_step_func,
        process_non_loss_data_func=None, extra_args_provider=None, args_defaults=None, get_embedding_ranks=None,
        get_position_embedding_ranks=None, non_loss_data_func=None, store=None, inprocess_call_wrapper=None,
    ):  # fmt: skip
        args.append(parsed(extra_args_provider))
        return get_model(model_provider)

    def model_provider(
        model_builder, pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
    ):
        return model_builder(args[0], pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection)

    model = executed(
        BLOCKS[0],
        pretrain=pretrain,
        model_provider=model_provider,
        core_transformer_config_from_args=lambda args: transformer_config(**options),
        GPTModel=GPTModel,
    )
    trains(model, layers)


if version()[:2] >= (0, 19):

    def test_the_lines_for_core_v0_19(monkeypatch: pytest.MonkeyPatch) -> None:
        """Its package has `megatron.training`: configuration and builder of the model are the real ones."""
        import typing_extensions

        monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)  # Python 3.12's
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import training
        from megatron.training.models.gpt import GPTModelConfig

        def gpt_config_from_args(args, config=None, model_config_cls=GPTModelConfig):
            return model_config_cls(
                transformer=transformer_config(),
                vocab_size=args.padded_vocab_size,
                seq_length=args.max_position_embeddings,
                position_embedding_type=args.position_embedding_type,
                share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            )

        def pretrain(*arguments, **more):
            bound = signature(training.pretrain).bind(*arguments, **more)
            model = bound.arguments["cfg_container"].model
            return model.get_builder_cls()(model).build_model(
                ProcessGroupCollection.use_mpu_process_groups(), True, True
            )

        model = executed(
            BLOCKS[1],
            pretrain=pretrain,
            parse_and_validate_args=lambda extra_args_provider=None, args_defaults=None: parsed(extra_args_provider),
            gpt_config_from_args=gpt_config_from_args,
            pretrain_cfg_container_from_args=lambda args, model_cfg=None: SimpleNamespace(model=model_cfg),
        )
        trains(model, 2)
