"""A driver process for the tests: launches toy workers the way `moesys launch` launches real ones.

python drive.py ray|local RUN_DIR RANKS_PER_NODE [launch.KEY=VALUE | cluster.KEY=VALUE | data.KEY=VALUE ...]
"""

import sys
from pathlib import Path

import yaml
from rich.console import Console

from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.launchers.launch import Workers, watch
from moesys.launchers.local import LocalWorkers
from moesys.launchers.spec import RunSpec

WORKER = Path(__file__).with_name("toy_worker.py")


def main(launcher: str, run_dir: str, ranks_per_node: str, *settings: str) -> int:
    """The exit code of the run."""
    sections: dict[str, dict[str, object]] = {
        "model": {"hidden": 8, "layers": 1},
        "cluster": {"ranks_per_node": int(ranks_per_node), "device": "cpu"},
        "launch": {"timeout_s": 60.0},
        "data": {},
    }
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        sections[section][name] = yaml.safe_load(value)
    spec = RunSpec.of(Config.model_validate(sections), Path(run_dir))
    try:
        return watch(workers(launcher, spec), spec, Console())
    except MoesysError as error:
        print(f"moesys: {error}", file=sys.stderr)
        return error.exit_code


def workers(launcher: str, spec: RunSpec) -> Workers:
    """Toy workers, started by `launcher`."""
    if launcher == "local":
        return LocalWorkers(spec, [sys.executable, str(WORKER), str(spec.run_dir)])
    from moesys.launchers.ray import RayWorkers

    return RayWorkers(spec, "toy_worker:run")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
