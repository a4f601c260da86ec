"""Workers on Ray: Ray Train's TorchTrainer starts them, gives them ranks, and restarts them.

This project adds the placement of workers, their environment, the choice of the error that is shown, and an orderly
end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesys import leftovers
from moesys.errors import LaunchError
from moesys.launchers import inherited_env
from moesys.launchers.address import ray_address
from moesys.launchers.outcome import Outcome, clear_traces
from moesys.launchers.ray_worker import WorkerTask
from moesys.launchers.spec import RunSpec, default_threads
from moesys.loopback import LOOPBACK
from moesys.train import device
from moesys.words import plural

if TYPE_CHECKING:
    from moesys.launchers.ray_cluster import EmbeddedRay, ExistingRay

RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # join our environment with that of `ray job submit`
    "RAY_enable_worker_prestart": "0",  # no idle workers: none of them would have the environment we need
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",  # its default of 15 lets every other process of the machine go first
}
"""Settings of Ray for this process and for a Ray that it starts."""


def job_environment(spec: RunSpec) -> dict[str, str]:
    """Settings that every process of the job must see, Ray Train's controller among them."""
    return {
        "PYTHONPATH": spec.env["PYTHONPATH"],
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how soon a dead worker is noticed
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(spec.config.launch.timeout_s),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


class RayWorkers:
    """The workers of a run as actors of Ray Train.

    `worker` ("module:function") is called in each as `function(config, run_dir)`, with the variables set by which
    ranks meet (`moesys.parallel.rendezvous`).
    """

    def __init__(self, spec: RunSpec, worker: str = "moesys.train.worker:run"):
        self.spec = spec
        self.worker = worker
        self._ray: EmbeddedRay | ExistingRay
        self._closing = ExitStack()

    def start(self, phase: Callable[[str], None]) -> None:
        """Start or join Ray, check that it has the nodes, start the workers; calls `phase` with what goes on.

        Raises `LaunchError` if there is no Ray or it is too small.
        """
        clear_traces(self.spec.run_dir)
        inherited_env.clear()  # Ray's processes inherit this one's environment
        job_env = job_environment(self.spec)
        phase("starting Ray")
        try:
            from moesys.launchers import ray_cluster
        except ModuleNotFoundError as error:
            remedy = 'pip install "ray[train]", or use --launcher local'
            raise LaunchError(f"Ray is not installed ({error})\n    remedy: {remedy}") from error
        self._closing.enter_context(ray_cluster.environment(RAY_ENV | job_env))
        address = ray_address(self.spec.config.launch.ray_address)
        self._check_nodes(address)
        log = self.spec.run_dir / "logs" / "ray.log"
        self._closing.enter_context(ray_cluster.deaths_to(log))
        owned = leftovers.OwnedResources("ray")
        self._closing.callback(owned.remove)
        if address is None:
            self._ray = ray_cluster.EmbeddedRay(self.spec.world, owned)
            self._storage = owned.path / "train"
        else:
            self._ray = ray_cluster.ExistingRay(address)
            self._storage = self.spec.run_dir / "ray"  # seen by all nodes
            owned.claim(self._storage)
        self._closing.callback(self._ray.stop)
        try:
            with ray_cluster.output_to(log):
                self._ray.start(job_env)
        except LaunchError:
            self._keep_logs()
            raise
        self._trainer = self._make_trainer()
        phase(f"starting {plural(self.spec.world, 'worker')}")
        self._start_fit()

    def poll(self) -> Outcome | None:
        """The outcome of the run once it has ended; None before."""
        if self._fit.is_alive():
            return None
        if self._error is None:
            return Outcome(0)
        from moesys.launchers.ray_errors import outcome_of

        timeout_s = self.spec.config.launch.timeout_s
        outcome = outcome_of(self._error, self.spec.run_dir, self._ray.where, timeout_s)
        if outcome.message.startswith("Ray failed"):
            self._keep_logs()
        return outcome

    def _keep_logs(self) -> None:
        self._ray.keep_logs(self.spec.run_dir / "logs" / "ray")

    def stop(self) -> None:
        """End the workers, and Ray if it was started for them."""
        self._closing.close()

    def _check_nodes(self, address: str | None) -> None:
        nodes = self.spec.config.cluster.nodes
        if address is None and nodes > 1:
            raise LaunchError(
                f"cluster.nodes is {nodes}, but Ray would be started on this machine alone\n    remedy: give "
                "the address of a running cluster (--ray-address HOST:6379), use --launcher slurm, or set "
                "cluster.nodes=1"
            )

    def _make_trainer(self) -> Any:
        from moesys.launchers import ray_cluster, ray_placement, ray_trainer

        spec, config = self.spec, self.spec.config
        placement = ray_placement.choose(config, spec.world, ray_cluster.living_nodes(), self._ray.where)
        task = WorkerTask(config=config, run_dir=str(spec.run_dir), cwd=str(Path.cwd()), worker=self.worker)
        return ray_trainer.make(
            task,
            placement,
            world=spec.world,
            env=self._worker_env(placement.device, placement.cores),
            max_failures=config.launch.max_failures,
            storage=self._storage,
        )

    def _worker_env(self, kind: str, cores: int) -> dict[str, str]:
        """`spec.env`, with what only the launcher knows: the devices, the network, the nodes' cores."""
        env = device.hide_gpus(kind)
        if self._ray.single_machine:
            return LOOPBACK | dict(self.spec.env) | env
        launch = self.spec.config.launch
        if launch.threads is None and "OMP_NUM_THREADS" not in {**os.environ, **launch.env}:
            env["OMP_NUM_THREADS"] = str(default_threads(cores, self.spec.config.cluster.ranks_per_node))
        return dict(self.spec.env) | env

    def _start_fit(self) -> None:
        self._error: BaseException | None = None
        self._fit = threading.Thread(target=self._run_fit, name="ray-train", daemon=True)
        self._fit.start()

    def _run_fit(self) -> None:
        """Run in a thread, so that the main thread can show progress and take signals."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = error
