"""Steps with a gradient or a loss that is not finite on one rank, in worker processes; importable by name."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from batches import connected, forget, join, start

from moesys.config import Config
from moesys.errors import TrainingError
from moesys.parallel import comm
from moesys.parallel.gradients import local
from moesys.train import checkpoint, guard

TARGET, WEIGHT = "layers.1.ffn.experts.fc1", "layers.1.attention.o_proj.weight"
BAD = {1: "gradient", 3: "gradient", 4: "loss"}
"""Steps, and what is not finite in them."""
STEPS = 6


def observed(configs: Mapping[str, Config], world: int, folder: Path) -> list[dict[str, Any]]:
    """By rank, of each configuration what `_observe` finds."""
    start(_work, world, dict(configs), folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, configs: dict[str, Config], folder: Path) -> None:
    join(rank, world, folder)
    found = {}
    for number, (name, config) in enumerate(configs.items()):
        found[name] = _observe(config, folder / str(number))
    torch.save(found, folder / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _observe(config: Config, folder: Path) -> dict[str, Any]:
    """A run with poisoned steps, stopped and continued from a checkpoint after every poisoned one; and the same run
    from which these steps are left out."""
    from moesys.data.corpus import open_corpus
    from moesys.train.loop import Trainer

    config, mesh = connected(config)
    corpus = open_corpus(config)
    trainer = Trainer(config, mesh, corpus)
    found: dict[str, Any] = {"kept": [], "skips": [], "records": [], "checkpoints": []}
    for step in range(1, STEPS + 1):
        before = trainer.engine.weights()
        if step in BAD:
            poison(trainer.engine, BAD[step])
        found["records"].append(trainer.train_step())
        if step in BAD:
            found["kept"].append(_equal(before, trainer.engine.weights()))
            found["skips"].append(trainer.guard.last)
            trainer.save(folder)
            trainer = Trainer(config, mesh, corpus)
            trainer.resume(folder)
            found["checkpoints"].append((trainer.guard.consecutive, trainer.guard.total))
    reference = Trainer(config, mesh, corpus)
    for step in range(1, STEPS + 1):
        if step in BAD:
            reference.step += 1
            reference.seen += config.train.global_batch
        else:
            # Nothing is gathered, and no number shared, for the sake of steps that are not finite.
            with comm.record() as events, patch.object(guard, "gathered", side_effect=AssertionError):
                reference.train_step()
            found["shared"] = sum(event.tag.part == "step" for event in events)
    found["equal"] = _equal(trainer.engine.weights(), reference.engine.weights())
    found["moved"] = not _equal(before, trainer.engine.weights())
    found["state"] = _poisoned_state(trainer, folder)
    del trainer, reference, mesh
    gc.collect()
    if config.engine == "native":
        forget()  # Megatron's ranks do so themselves
    return found


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def poison(engine: Any, what: str) -> None:
    """Spoil the next step on the last rank alone, at the moment when its gradients are complete."""
    mine = dist.get_rank() == dist.get_world_size() - 1
    if what == "loss":
        update = engine.update
        if mine:
            experts = engine.moe_layers()["layers.1.ffn"].experts
            hook = experts.register_forward_hook(lambda _, __, out: out * float("nan"))

        def healed(rate: float) -> Any:
            engine.update = update
            if mine:
                hook.remove()
            return update(rate)

        engine.update = healed
    elif engine.config.engine == "native":
        reduce = engine.model.gradients.reduce

        def poisoned() -> None:
            engine.model.gradients.reduce = reduce
            reduce()
            if mine:
                local(engine.model.named_parameters()[TARGET].grad).view(-1)[0] = float("inf")

        engine.model.gradients.reduce = poisoned
    else:
        finalize = engine.transformer.finalize_model_grads_func

        def spoiled(*arguments: Any, **more: Any) -> None:
            engine.transformer.finalize_model_grads_func = finalize
            if mine:
                next(p for p, piece, _ in engine.pieces() if piece.name == TARGET).main_grad.view(-1)[0] = float("inf")
            finalize(*arguments, **more)

        engine.transformer.finalize_model_grads_func = spoiled


def _poisoned_state(trainer: Any, folder: Path) -> list[str]:
    """What is said when `WEIGHT` is not finite: on the last rank, by saving, which changes nothing, and by training;
    and everywhere, as a checkpoint has it, by loading."""
    before = sorted(path.name for path in folder.glob("step-*"))
    if dist.get_rank() == dist.get_world_size() - 1:
        _spoil(trainer.engine)
    told = [_said(lambda: trainer.save(folder))]
    assert sorted(path.name for path in folder.glob("step-*")) == before
    trainer.train_step()
    told.append(_said(lambda: trainer.guard.check(checkpoint.newest(folder))))
    _spoil(trainer.engine)
    with patch("moesys.train.loop.demand_finite"):
        trainer.save(folder / "spoiled")
    return [*told, _said(lambda: trainer.resume(folder / "spoiled"))]


def _spoil(engine: Any) -> None:
    if engine.config.engine == "native":
        held = [local(p.detach()) for name, p in engine.model.named_parameters().items() if name == WEIGHT]
    else:
        held = [part for _, piece, part in engine.pieces() if piece.name == WEIGHT]
        held += [main.view(-1) for p, piece, _ in engine.pieces() if piece.name == WEIGHT for main in _mains(engine, p)]
    for part in held:
        part.view(-1)[:1] = float("nan")


def _mains(engine: Any, parameter: Any) -> list[torch.Tensor]:
    """What Megatron's optimizer has of a parameter here, which is what its checkpoints hold."""
    kept = engine._state().kept
    return [kept[id(parameter)][1]] if id(parameter) in kept else []


def _said(work: Callable[[], object]) -> str:
    try:
        work()
    except TrainingError as error:
        return str(error)
    return ""
