"""Checks before any worker starts: a port that is taken, data that cannot be read, weights that do not fit."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

from moesys.config.schema import Config
from moesys.data.corpus import open_corpus, open_texts
from moesys.errors import LaunchError
from moesys.launchers.address import ray_address
from moesys.train import initial_weights
from moesys.train.manifest import newest


def is_here(config: Config, launcher: str) -> bool:
    """True if rank 0 will run on this machine, in its network."""
    return launcher == "local" or (launcher == "ray" and ray_address(config.launch.ray_address) is None)


def port(config: Config, launcher: str) -> None:
    """Try the port of `measure.metrics_port` if rank 0 will run on this machine.

    Raises:
        LaunchError: it cannot be had.
    """
    host, number = config.measure.metrics_host, config.measure.metrics_port
    if number is None:
        return
    if importlib.util.find_spec("prometheus_client") is None:
        rule = "measure.metrics_port: needs the package prometheus_client, which is not installed"
        raise LaunchError(f"{rule}\n    remedy: pip install prometheus_client, or leave it out")
    if not is_here(config, launcher):
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        rule = f"measure.metrics_port: {host}:{number}: {(error.strerror or str(error)).lower()}"
        raise LaunchError(f"{rule}\n    remedy: choose another port, or another measure.metrics_host") from None


def weights(config: Config, launcher: str, run_dir: Path) -> None:
    """Compare what `train.init` names with the model if all workers are on this machine and the run is new.

    Raises:
        FileError, CheckpointError: it is missing, damaged or of another model.
    """
    if (is_here(config, launcher) or launcher == "hosts") and newest(run_dir / "checkpoints") is None:
        initial_weights.find(config)


def data(config: Config, launcher: str, own: bool = True) -> None:
    """Read and tokenize the text if all workers are on this machine; they find the tokens in `data.cache`.

    Megatron's data are tokens already, and their reader imports torch: they are left out. Without `own` the texts of
    `train.eval` are meant alone.

    Raises:
        DataError: the data cannot be read, or are too few.
    """
    sources = [text.kind for text in config.train.eval.values()] + [config.data.kind] * own
    if "megatron" not in sources and (is_here(config, launcher) or launcher == "hosts"):
        (open_corpus if own else open_texts)(config)
