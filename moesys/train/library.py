"""What `import moesys` offers that starts from a configuration: reading one, a layer by its keys, a trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesys import shipped
from moesys.config.schema import Config
from moesys.config.values import config_of
from moesys.errors import ConfigError
from moesys.models.parts.moe import MoEFeedForward
from moesys.parallel import expert
from moesys.parallel.degrees import Degrees
from moesys.train.validate import load_checked

if TYPE_CHECKING:
    from moesys.moe.layer import MoELayer
    from moesys.train.loop import Trainer


def load_config(path: str | Path, overrides: Sequence[str] = (), world: int | None = None) -> Config:
    """The configuration in a YAML file, checked key by key and against every rule between keys. Needs no torch.

        config = moesys.load_config("configs/quickstart.yaml", ["train.steps=10", "parallel.pp=1"])
        config.train.steps    # 10

    Args:
        path: a file; "configs/…" may be one that comes with the package.
        overrides: "key.sub=value", which win over the file.
        world: the ranks that will run it; None: those of its section `cluster`.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    return load_checked(shipped.config(str(path)), overrides, world, with_data=False)


def build_moe_layer(hidden: int, *, layer: int = 0, **keys: Any) -> MoELayer:
    """An MoE layer described by the keys of `model.moe` in a configuration: x [B, S, hidden] → the same.

        layer = moesys.build_moe_layer(512, experts=8, top_k=2, ffn_hidden=1024, gate={"kind": "expert_choice"})

    Args:
        hidden: size of a token.
        layer: the layer's number in the model, by which random routing differs between layers.
        keys: as in YAML; sections are mappings.

    Raises:
        ConfigError: an unknown key, an illegal value, or keys that do not go together.
    """
    config = config_of({"model": {"hidden": hidden, "layers": layer + 1, "moe": keys}})
    assert config.model.moe is not None
    rules = MoEFeedForward(config.model.moe, hidden, layer).check()
    if problems := rules + expert.check(config, Degrees()):
        raise ConfigError(problems)
    from moesys.models.moe import build_moe

    return build_moe(config.model.moe, hidden, layer)


def build_trainer(config: Config) -> Trainer:
    """The trainer of a configuration, on this rank: model, data and optimizer. Collective over all ranks.

    In a script that torchrun starts, or in one process:

        trainer = moesys.build_trainer(moesys.load_config("mine.yaml"))
        for _ in range(trainer.config.train.steps):
            metrics = trainer.train_step()    # {"step": 1, "loss": 5.7, "grad_norm": …}
        trainer.evaluate(); trainer.save(Path("checkpoints"))

    The process group is the one that there is, the one that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), or one of this process alone.

    Raises:
        MoesysError: the configuration does not fit so many ranks, or data are missing.
    """
    import torch.distributed as dist

    from moesys.data.corpus import open_corpus
    from moesys.train.engine import engine_of
    from moesys.train.loop import Trainer

    if not dist.is_initialized() and "RANK" not in os.environ:
        backend = "cpu:gloo,cuda:nccl" if config.cluster.device != "cpu" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = engine_of(config).connect(config)
    return Trainer(config, mesh, open_corpus(config))
