"""The `moesys` command: one thin function per subcommand.

moesys launch configs/quickstart.yaml
moesys launch configs/mixtral-8x7b-16x8gpu.yaml --dry-run
moesys verify configs/quickstart.yaml parallel.tp=2
moesys config configs/quickstart.yaml train.steps=10
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moesys import terminal
from moesys.command_line import parser, strange
from moesys.errors import ConfigError, MoesysError
from moesys.files import write_json
from moesys.launchers import inherited_env
from moesys.words import plural

DOES_NOT_FIT = 3
"""Exit code of a configuration that is legal, but needs more memory than it says there is."""


def init(arguments: argparse.Namespace) -> int:
    """Write a configuration to start from, or list those that there are."""
    from moesys.config import starter

    if arguments.name is None:
        if arguments.to is not None:
            arguments.parser.error("--to goes with a name: moesys init lists all names")
        print("\n".join(f"{name}\n    {about}" for name, about in starter.starters().items()))
        return 0
    path = Path(f"{arguments.name}.yaml") if arguments.to is None else arguments.to
    starter.write(arguments.name, path)
    print(f"{path} is written; start it: moesys launch {path}")
    return 0


def launch(arguments: argparse.Namespace) -> int:
    """Train a configuration, or show what would be started."""
    from rich.console import Console

    from moesys.train.validate import load_checked

    if arguments.json is not None and not arguments.dry_run:
        arguments.parser.error("--json goes with --dry-run; a run writes its figures to summary.json in its folder")
    overrides = list(arguments.overrides)
    if arguments.launcher:
        overrides.append(f"launch.launcher={arguments.launcher}")
    if arguments.ray_address:
        overrides.append(f"launch.ray_address={arguments.ray_address}")
    if arguments.metrics_port is not None:
        overrides.append(f"measure.metrics_port={arguments.metrics_port}")
    config = load_checked(arguments.config, overrides, with_data=not arguments.dry_run)
    if arguments.measure:
        config = config.measured()
    if arguments.dry_run:
        from moesys.launchers import dry_run

        facts = dry_run.plan(config)
        if config.launch.launcher == "slurm":
            from moesys.launchers.slurm import script
            from moesys.launchers.spec import RunSpec

            print(script(RunSpec.of(config)), end="")
            if facts["fits"] is False:
                print(f"moesys launch: {dry_run.verdict(config, facts)}", file=sys.stderr)
        else:
            dry_run.show(config, Console(), facts)
        _write_json(arguments.json, lambda: facts)
        return DOES_NOT_FIT if facts["fits"] is False else 0
    from moesys.config.load import dump
    from moesys.launchers.launch import launch as start
    from moesys.launchers.lock import locked
    from moesys.launchers.spec import RunSpec
    from moesys.train import resume, run_folder

    spec = RunSpec.of(config)
    with locked(spec.run_dir):
        for line in resume.check(spec.run_dir, spec.config):
            print(line, flush=True)
        with run_folder.proposed(spec.run_dir, dump(spec.config)):
            return start(spec, config.launch.launcher)


def sweep(arguments: argparse.Namespace) -> int:
    """Train the variations that a file names, and compare them; or print the schema for editors."""
    if arguments.schema:
        from moesys.config.write import json_schema_of_sweeps

        print(json.dumps(json_schema_of_sweeps(), indent=1))
        return 0
    if arguments.config is None:
        arguments.parser.error("give a sweep's file, or --schema")
    from rich.console import Console

    from moesys.launchers.sweep import Sweep, run

    return run(Sweep.load(arguments.config, arguments.overrides), Console())


def show_config(arguments: argparse.Namespace) -> int:
    """Print the resolved configuration, whether it fits, the schema for editors, or what is shipped."""
    from moesys.config.load import dump, json_schema

    if arguments.schema:
        print(json.dumps(json_schema(), indent=1))
        return 0
    if arguments.list:
        from moesys import shipped

        print(f"in {shipped.FOLDER}:")
        print("\n".join(f"  {name}\n      {about}" for name, about in shipped.configs()))
        return 0
    if arguments.config is None:
        arguments.parser.error("give a configuration file, --schema, or --list")
    from moesys.train.validate import load_checked

    config = load_checked(arguments.config, arguments.overrides, with_data=False)
    if not arguments.check:
        print(dump(config), end="")
        return 0
    from moesys.launchers import dry_run

    facts = dry_run.plan(config)
    print(f"{config.name}: legal on {facts['world_size']} ranks; {dry_run.verdict(config, facts)}")
    return DOES_NOT_FIT if facts["fits"] is False else 0


def verify(arguments: argparse.Namespace) -> int:
    """Prove that a configuration computes what one process computes."""
    from moesys.train.validate import load_checked

    config = load_checked(arguments.config, arguments.overrides)
    world = config.cluster.nodes * config.cluster.ranks_per_node
    # One thread pool per process is enough: the processes share this machine's cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    from moesys.train.verify import TOLERANCES, unprovable, untried
    from moesys.train.verify import verify as prove

    if problems := untried(config, arguments.dtype, arguments.against):
        raise ConfigError(problems)
    if arguments.tolerance is None and (problems := unprovable(config, TOLERANCES[arguments.dtype])):
        raise ConfigError(problems)

    steps = plural(arguments.steps, "step")
    one = "1 process" if arguments.against in (None, config.engine) else f"1 process of engine {arguments.against}"
    print(f"{config.name}: {steps} in {one} and in {world}, {arguments.dtype}", flush=True)
    tolerance = TOLERANCES[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    report = prove(config, world, arguments.steps, tolerance, arguments.dtype, arguments.against)
    for kind in ("loss", "norm", "gradient", "parameter"):
        difference = getattr(report, kind)
        verdict = "" if difference.value <= tolerance else f"  over {tolerance:g}"
        where = f"  at {difference.where}" if difference.where else ""
        print(f"  {kind:<9} largest relative difference {difference.value:.2e}{where}{verdict}")
    print("equal" if report.passed else "NOT EQUAL")
    _write_json(arguments.json, report.as_json)
    return 0 if report.passed else 1


def bench_train(arguments: argparse.Namespace) -> int:
    """Compare training speed with transformers, and time the launchers."""
    return _compare("train", arguments)


def bench_megatron(arguments: argparse.Namespace) -> int:
    """Compare training steps with this project's MoE layer, Megatron's own, and the native engine."""
    return _compare("megatron", arguments)


def bench_load(arguments: argparse.Namespace) -> int:
    """Compare the loading of a released model with transformers, and with reading its bytes."""
    return _compare("load", arguments)


def _compare(name: str, arguments: argparse.Namespace) -> int:
    from moesys.comparisons import demanded

    result = demanded(name, f"bench {name}").command(arguments)
    print("\n".join(result.lines()))
    _write_json(arguments.json, result.as_json)
    return 0


def bench_measure(arguments: argparse.Namespace) -> int:
    """Compare training steps with and without recording."""
    from moesys.train.validate import load_checked

    config = load_checked(arguments.config, arguments.overrides, with_data=arguments.simulate is None)
    from moesys.train import bench_measure

    if arguments.simulate is not None:
        simulated = bench_measure.simulated(config, arguments.simulate)
        print("\n".join(simulated.lines()))
        _write_json(arguments.json, simulated.as_json)
        return 0
    result = bench_measure.run(config, arguments.rounds, arguments.steps)
    print("\n".join(result.lines()))
    _write_json(arguments.json, result.as_json)
    return 0


def import_released(arguments: argparse.Namespace) -> int:
    """Write the configuration of a released model."""
    from moesys.launchers.released import import_command

    return import_command(arguments.folder, arguments.to)


def export_released(arguments: argparse.Namespace) -> int:
    """Write a checkpoint as a released model's folder."""
    from moesys.launchers.released import export_command

    a = arguments
    return export_command(a.checkpoint, a.to, a.dtype, a.shard_size, a.family)


def generate(arguments: argparse.Namespace) -> int:
    """Write text with a trained model."""
    from moesys.train.generate import command

    return command(arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """Compute the losses of a trained model on held-out texts, or run tasks with it."""
    if arguments.tasks:
        given = [f"--{name}" for name in ("data", "all", "launcher") if getattr(arguments, name)]
        if unused := [*given, *arguments.overrides]:
            arguments.parser.error(f"{' and '.join(unused)} would have no effect with --tasks")
        from moesys.train.eval_tasks import command as run_tasks

        return run_tasks(arguments)
    if arguments.limit is not None:
        arguments.parser.error("--limit goes with --tasks; train.eval_sequences=N limits losses")
    from moesys.launchers.evaluate import command

    return command(arguments)


def report(arguments: argparse.Namespace) -> int:
    """Explain a run, two runs, or traces."""
    if arguments.trace and arguments.runs:
        arguments.parser.error("--trace goes without a run's folder: give either")
    kind = "traces" if arguments.trace else "two runs" if len(arguments.runs) == 2 else "one run"
    unused = {"traces": ("perfetto", "profile"), "two runs": ("perfetto", "profile"), "one run": ()}[kind]
    if ignored := [f"--{name}" for name in unused if getattr(arguments, name) is not None]:
        arguments.parser.error(f"{' and '.join(ignored)} would have no effect with {kind}")
    from moesys.launchers.report import command

    return command(arguments)


def what_if(arguments: argparse.Namespace) -> int:
    """Predict a recorded run's step with other settings."""
    from moesys.launchers.what_if import command

    return command(arguments)


def bench_a2a(arguments: argparse.Namespace) -> int:
    """Time collectives on the ranks that the launcher places."""
    from moesys.launchers.bench_a2a import command

    return command(arguments)


def bench_layer(arguments: argparse.Namespace) -> int:
    """Time one MoE layer beside its arithmetic and beside other systems' layers."""
    from moesys.measure.layer_benchmark import command as bench_command

    results = bench_command.run(arguments)
    _write_json(arguments.json, lambda: [result.as_json() for result in results])
    return 0


def _write_json(path: Path | None, facts: Callable[[], object]) -> None:
    if path is not None:
        write_json(path, facts())


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "init": init,
    "launch": launch,
    "sweep": sweep,
    "config": show_config,
    "verify": verify,
    "import": import_released,
    "export": export_released,
    "generate": generate,
    "eval": evaluate,
    "report": report,
    "what_if": what_if,
    "bench_train": bench_train,
    "bench_a2a": bench_a2a,
    "bench_measure": bench_measure,
    "bench_megatron": bench_megatron,
    "bench_layer": bench_layer,
    "bench_load": bench_load,
}
"""The function of each command."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; errors meant for the user become one message and an exit code."""
    terminal.forgive()
    # argparse takes no positional arguments after an option once it has seen some: collect overrides.
    arguments, rest = parser().parse_known_args(words)
    if wrong := strange(arguments.parser, rest, arguments.takes_overrides):
        arguments.parser.error(wrong)
    arguments.overrides = [*arguments.overrides, *rest]
    inherited_env.clear()
    # OpenMP's idle threads spin for about ten milliseconds before they sleep, on cores that the experts' threads
    # need. OpenMP reads this limit when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above all levels: its profiler prints every start and stop
    try:
        return COMMANDS[arguments.run](arguments)
    except MoesysError as error:
        print(f"moesys {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as `| head`, has closed the pipe; Python's last flush must not fail on it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
