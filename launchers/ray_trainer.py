"""Ray Train's TorchTrainer, set up for one run.

At run time the names of `ray.train` are those of its version 2; type checkers see version 1, hence the ignores.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from moesys.launchers.ray_placement import Placement
from moesys.launchers.ray_rendezvous import Rendezvous, loop
from moesys.launchers.ray_worker import WorkerTask
from moesys.launchers.spec import late_variables

NEEDLESS = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Parts of Ray Train that each start one more process. The cleaner fills its log on a Ray without dashboard
(it asks that for the controller's state every second); placement groups end with the job anyway. The other
splits data sets of Ray Data, which we do not use."""


class AtOnce(FixedScalingPolicy):
    """Places workers on existing nodes, and requests no others.

    Ray Train asks a coordinator, which is one more process whose start is waited for: ten seconds on two cores.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """No request to register."""

    def _maybe_send_resource_request(self) -> None:
        """No request to repeat."""


class LeanTorchTrainer(TorchTrainer):
    """TorchTrainer without the parts that a run of ours does not need."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = arguments.get("scaling_policy")
        if type(policy) is FixedScalingPolicy:
            arguments["scaling_policy"] = AtOnce(policy.scaling_config)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]

    def _create_default_callbacks(self) -> list[Any]:
        return [
            part
            for part in super()._create_default_callbacks()  # type: ignore[misc]
            if type(part).__name__ not in NEEDLESS
        ]


def make(
    task: WorkerTask,
    placement: Placement,
    *,
    world: int,
    env: Mapping[str, str],
    max_failures: int,
    storage: Path,
) -> TorchTrainer:
    """A trainer of `world` workers that do `task` with environment `env`.

    Ray logs the environment of processes that it starts. So only variables that a process needs from its first moment
    are passed that way.

    `max_failures` restarts of all workers; Ray's own failures to start them are counted apart, up to the
    same number. Nothing is reported through Ray, so `storage` stays empty but for its bookkeeping.
    """
    late = late_variables(env)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    return LeanTorchTrainer(
        partial(loop, late, task),  # not train_loop_config, which Ray Train may export
        torch_config=Rendezvous(backend="nccl" if placement.device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=world,
            use_gpu=placement.device == "cuda",
            resources_per_worker=placement.resources,
            placement_strategy=placement.strategy,
            label_selector=placement.labels,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            storage_path=str(storage),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=max_failures, controller_failure_limit=max_failures
            ),
            worker_runtime_env={"env_vars": {name: value for name, value in env.items() if name not in late}},
        ),
    )
