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

from moesys import __version__, terminal
from moesys.errors import ConfigError, MoesysError
from moesys.files import write_json
from moesys.launchers import foreign
from moesys.options import count, output, tolerance
from moesys.words import plural


def launch(arguments: argparse.Namespace) -> int:
    """Train a configuration, or show what would be started."""
    from rich.console import Console

    from moesys.train.checked import load_checked

    overrides = list(arguments.overrides)
    if arguments.launcher:
        overrides.append(f"launch.launcher={arguments.launcher}")
    if arguments.ray_address:
        overrides.append(f"launch.ray_address={arguments.ray_address}")
    if arguments.metrics_port:
        overrides.append(f"measure.metrics_port={arguments.metrics_port}")
    config = load_checked(arguments.config, overrides, with_data=not arguments.dry_run)
    if arguments.measure:
        config = config.measured()
    if arguments.dry_run and config.launch.launcher == "slurm":
        from moesys.launchers.slurm import script
        from moesys.launchers.spec import RunSpec

        print(script(RunSpec.of(config)), end="")
        return 0
    if arguments.dry_run:
        from moesys.launchers import dry_run

        dry_run.show(config, Console())
        _write_json(arguments.json, lambda: dry_run.plan(config))
        return 0
    from moesys.config.load import dump
    from moesys.launchers.launch import launch as start
    from moesys.launchers.lock import locked
    from moesys.launchers.spec import RunSpec
    from moesys.train import resume, run_folder

    spec = RunSpec.of(config)
    with locked(spec.run_dir):
        resume.check(spec.run_dir, spec.config)
        with run_folder.proposed(spec.run_dir, dump(spec.config)):
            return start(spec, config.launch.launcher)


def sweep(arguments: argparse.Namespace) -> int:
    """Train the variations that a file names, and compare them."""
    from rich.console import Console

    from moesys.launchers.sweep import Sweep, run

    return run(Sweep.load(arguments.config, arguments.overrides), Console())


def show_config(arguments: argparse.Namespace) -> int:
    """Print the resolved configuration, or the schema for editors."""
    from moesys.config.load import dump, json_schema

    if arguments.schema:
        print(json.dumps(json_schema(), indent=1))
        return 0
    if arguments.config is None:
        raise SystemExit("moesys config: give a configuration file, or --schema")
    from moesys.train.checked import load_checked

    print(dump(load_checked(arguments.config, arguments.overrides, with_data=False)), end="")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Prove that a configuration computes what one process computes."""
    from moesys.train.checked import load_checked

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
    from moesys.train.checked import load_checked

    config = load_checked(arguments.config, arguments.overrides)
    from moesys.train.bench import run

    result = run(config, arguments.rounds, arguments.steps, ("local", "ray"), arguments.config, arguments.overrides)
    print(f"{result.machine}, {result.date}")
    print(f"  medians of {plural(result.rounds, 'interleaved round')} of {plural(result.steps_per_round, 'step')}")
    print(f"  moesys        {result.ours:>10,.0f} tokens/s, one process")
    print(f"  transformers  {result.transformers:>10,.0f} tokens/s, the same shape and batches")
    print(f"  ratio         {result.ratio:>10.2f}")
    for launcher, seconds in result.first_step_seconds.items():
        print(f"  {launcher:<6} from command to first step {seconds:>6.1f} s")
    _write_json(arguments.json, result.as_json)
    return 0


def bench_megatron(arguments: argparse.Namespace) -> int:
    """Compare training steps with this project's MoE layer, Megatron's own, and the native engine."""
    from moesys.train.checked import load_checked

    config = load_checked(arguments.config, arguments.overrides)
    from moesys.megatron.bench import run

    result = run(config, arguments.rounds, arguments.steps)
    print("\n".join(result.lines()))
    _write_json(arguments.json, result.as_json)
    return 0


def bench_measure(arguments: argparse.Namespace) -> int:
    """Compare training steps with and without recording."""
    from moesys.train.checked import load_checked

    config = load_checked(arguments.config, arguments.overrides)
    from moesys.train.bench_measure import run

    result = run(config, arguments.rounds, arguments.steps)
    print("\n".join(result.lines()))
    _write_json(arguments.json, result.as_json)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Explain a run, two runs, or traces."""
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
    from moesys.measure import bench_command
    from moesys.megatron.own_layer import peers

    results = bench_command.run(arguments, peers)
    _write_json(arguments.json, lambda: [result.as_json() for result in results])
    return 0


def _write_json(path: Path | None, facts: Callable[[], object]) -> None:
    if path is not None:
        write_json(path, facts())


def parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    top = argparse.ArgumentParser(prog="moesys", description="Launch, choose and measure the training of MoE models.")
    top.add_argument("--version", action="version", version=f"moesys {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, optional: bool = False
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("config", type=Path, nargs="?" if optional else None, help="a YAML file")
        sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the file")
        sub.set_defaults(run=run)
        return sub

    sub = command("launch", launch, "train a configuration")
    sub.add_argument("--launcher", choices=("ray", "local", "hosts", "slurm"), help="instead of launch.launcher")
    sub.add_argument("--ray-address", help="a running Ray cluster, instead of launch.ray_address")
    sub.add_argument("--measure", action="store_true", help="record about twenty steps, unless measure says which")
    sub.add_argument(
        "--metrics-port", type=int, help="tell metrics to Prometheus here; instead of measure.metrics_port"
    )
    sub.add_argument("--dry-run", action="store_true", help="show ranks, meshes, memory; start nothing")
    sub.add_argument("--json", type=output, help="with --dry-run: write the same facts here")
    command("sweep", sweep, "train variations of a configuration and compare them")
    sub = command("config", show_config, "print the resolved configuration", optional=True)
    sub.add_argument("--schema", action="store_true", help="print the JSON schema for editors")
    sub = command("verify", verify, "prove that a configuration equals one process")
    sub.add_argument("--steps", type=count, default=3, help="training steps (default 3)")
    text = "largest relative difference (default: 1e-5, 1e-10 in float64, 1e-2 in bfloat16)"
    sub.add_argument("--tolerance", type=tolerance, help=text)
    sub.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    sub.add_argument("--against", choices=("native", "megatron"), help="engine of the one process; default: the same")
    sub.add_argument("--json", type=output, help="write the differences here")
    sub = commands.add_parser("report", help="a run, two runs, or traces of any framework, explained")
    sub.add_argument(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="one run's folder, or two to compare, or what bench a2a --json wrote",
    )
    sub.add_argument("--trace", type=Path, nargs="+", metavar="FILE", help="traces of torch's profiler, one a rank")
    text = "--trace: kernels without metadata whose names match are all-to-all; none: none is (default: inferred)"
    sub.add_argument("--all-to-all-kernels", metavar="REGEX", help=text)
    sub.add_argument("--out", type=output, help="the page of two runs or of traces; default: in this folder")
    sub.add_argument("--json", type=output, help="write the figures here")
    sub.add_argument("--perfetto", type=output, metavar="FILE", help="write recorded steps as a trace (.json[.gz])")
    sub.add_argument("--profile", type=Path, metavar="FILE", help="links, from bench a2a; instead of measure.profile")
    sub.set_defaults(run=report, overrides=[])
    sub = commands.add_parser("what-if", help="predict a recorded run's step with other settings")
    sub.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run that recorded steps")
    sub.add_argument("--profile", type=Path, metavar="FILE", help="links, from bench a2a; instead of measure.profile")
    text = "a setting to predict, as in 'parallel.ep=2 parallel.dispatch.chunks=2'; default: a choice of them"
    sub.add_argument("--change", action="append", metavar="'key=value …'", help=text)
    sub.add_argument("--measure", action="store_true", help="run each setting as well, and show both")
    sub.set_defaults(run=what_if, overrides=[])
    bench = commands.add_parser("bench", help="benchmarks").add_subparsers(dest="benchmark", required=True)
    sub = bench.add_parser("train", help="training speed beside transformers, and time to the first step")
    sub.add_argument("config", type=Path, help="a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--rounds", type=count, default=7)
    sub.add_argument("--steps", type=count, default=5, help="training steps per round")
    sub.add_argument("--json", type=output, help="write the figures here")
    sub.set_defaults(run=bench_train)
    sub = bench.add_parser("a2a", help="collectives on the ranks of a configuration, as nccl-tests does")
    a2a_options(sub)
    sub.set_defaults(run=bench_a2a)
    sub = bench.add_parser("measure", help="what recording communication costs")
    sub.add_argument("config", type=Path, help="a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--rounds", type=count, default=7)
    sub.add_argument("--steps", type=count, default=15, help="training steps per round of each side, at least")
    sub.add_argument("--json", type=output, help="write the figures here")
    sub.set_defaults(run=bench_measure)
    sub = bench.add_parser("megatron", help="Megatron-Core's model with this project's MoE layer and with its own")
    sub.add_argument("config", type=Path, help="a YAML file with engine: megatron")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--rounds", type=count, default=7)
    sub.add_argument("--steps", type=count, default=3, help="training steps per round of each side")
    sub.add_argument("--json", type=output, help="write the figures here")
    sub.set_defaults(run=bench_megatron)
    sub = bench.add_parser("layer", help="one MoE layer beside dense products, transformers, Megatron-Core, DeepSpeed")
    sub.add_argument("--shape", help="a published shape; default: laptop, with --ranks two-ranks")
    for name in ("tokens", "hidden", "ffn-hidden", "experts", "top-k"):
        sub.add_argument(f"--{name}", type=int, help="instead of the shape's")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: both; on a GPU bfloat16")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--ranks", type=int, default=1, help="processes on this machine that share the experts")
    sub.add_argument("--rounds", type=count, help="default: what a minute allows, 3 to 31")
    sub.add_argument("--json", type=output, help="write the figures here")
    sub.set_defaults(run=bench_layer, overrides=[])
    return top


def a2a_options(sub: argparse.ArgumentParser) -> None:
    """The options of `moesys bench a2a`."""
    from moesys.measure.sizes import COLLECTIVES, GROUPS, size

    sub.add_argument("config", type=Path, help="a YAML file: its cluster, its launcher and its expert groups are used")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sub.add_argument("--launcher", choices=("ray", "local", "hosts"), help="instead of launch.launcher")
    sub.add_argument("--collectives", nargs="+", choices=COLLECTIVES, metavar="NAME", help=", ".join(COLLECTIVES))
    text = "intra: a node's ranks; inter: one of each node; expert; world (default: all of them)"
    sub.add_argument("--groups", nargs="+", choices=GROUPS, help=text)
    sub.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    sub.add_argument("--min", type=size, default=2**10, metavar="SIZE", help="bytes that a rank sends (default 1K)")
    sub.add_argument("--max", type=size, default=2**30, metavar="SIZE", help="(default 1G, or what memory allows)")
    sub.add_argument("--factor", type=int, default=4, help="from one size to the next (default 4)")
    sub.add_argument("--iterations", type=int, default=20)
    sub.add_argument("--warmup", type=int, default=3)
    sub.add_argument("--skew", type=float, help="also uneven all-to-alls: bytes to rank r ∝ 1 / (r + 1)^skew")
    sub.add_argument("--matrix", type=Path, metavar="FILE", help="also uneven all-to-alls in this pattern of bytes")
    text = "also uneven all-to-alls as in a run that recorded its routing (output.record_routing)"
    sub.add_argument("--routing", type=Path, metavar="FOLDER", help=text)
    kinds = ("all_to_all", "all_gather", "hierarchical")
    text = "time these dispatchers with batches of tokens (and no collectives, unless --collectives names them)"
    sub.add_argument("--dispatch", nargs="+", choices=kinds, help=text)
    sub.add_argument("--tokens", type=int, default=1024, help="--dispatch: of each rank")
    sub.add_argument("--hidden", type=int, default=1024, help="--dispatch: elements of a token")
    sub.add_argument("--top-k", type=int, default=2, help="--dispatch: experts of a token")
    sub.add_argument("--no-check", dest="check", action="store_false", help="do not validate results")
    sub.add_argument("--plain", action="store_true", help="beside a bare loop around torch's all_to_all_single")
    sub.add_argument("--json", type=output, help="write the figures here, in the shape of nccl-tests' -J")
    sub.add_argument("--profile", type=output, metavar="FILE", help="write the fitted links here, for predictions")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; errors meant for the user become one message and an exit code."""
    terminal.forgive()
    # argparse takes no positional arguments after an option once it has seen some: collect overrides.
    arguments, rest = parser().parse_known_args(words)
    if strange := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser().error(f"unrecognized arguments: {' '.join(strange)}")
    arguments.overrides = [*arguments.overrides, *rest]
    foreign.forget()
    # OpenMP's idle threads spin for some ten milliseconds before they sleep, on cores that experts' own threads
    # need; it is told how long when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above all levels: its profiler tells of every start and stop
    try:
        return arguments.run(arguments)
    except MoesysError as error:
        print(f"moesys {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
