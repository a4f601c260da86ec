"""The subcommands of `moesys` with their options, examples and guides."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moesys import shipped
from moesys.config import suggest
from moesys.config.registry import DISPATCHERS, kinds
from moesys.options import count, finite, output, seed, share, tolerance
from moesys.version import __version__

EXIT_CODES = """\
exit codes:
  0    done
  1    it failed: a worker, a proof, a benchmark's check
  2    wrong input; nothing was started
  3    legal, but does not fit in cluster.memory_gib (launch --dry-run, config --check)
  130  stopped, by Ctrl-C or SIGTERM"""

LAUNCHERS = ("ray", "local", "hosts", "slurm")


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that names every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        said = "default" in text or not action.option_strings or action.nargs == 0
        if said or action.default in (None, argparse.SUPPRESS):
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{text} (default: {default})".lstrip()


class Parser(argparse.ArgumentParser):
    """A parser with errors that suggest the intended word."""

    def error(self, message: str) -> NoReturn:
        """Print the error, the closest legal word and a pointer to --help; exit with code 2."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        near = suggest.choice(wrong[1], re.findall(r"'([^']*)'", wrong[2])) if wrong else None
        if near:
            message += f"\n    remedy: did you mean {near}?"
        self.exit(2, f"{self.prog}: {message}\n    all options: {self.prog} --help\n")

    def options(self) -> list[str]:
        """All words that begin with dashes."""
        return [word for action in self._actions for word in action.option_strings]


def strange(parser: Parser, words: Sequence[str], overrides: bool) -> str | None:
    """The error in `words`, which `parser` does not know; None if all are overrides and these are allowed."""
    for number, word in enumerate(words):
        if overrides and "=" in word and not word.startswith("-"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        text = f"unrecognized argument {word}"
        if not word.startswith("-"):
            return f"{text}\n    remedy: overrides are written key.sub=value" if overrides else text
        near = difflib.get_close_matches(f"--{name}", parser.options(), 1, 0.7)
        if overrides and re.fullmatch(r"\w+(\.\w+)+", name):
            following = words[number + 1 :][:1]
            given = value if equals else following[0] if following else "VALUE"
            return f"{text}\n    remedy: overrides are written without dashes: {name}={given}"
        joined = {option.replace("-", ""): option for option in parser.options()}
        meant = joined.get(name.replace("-", "").replace("_", "").lower()) or (near[0] if near else "")
        return f"{text}\n    remedy: did you mean {meant}?" if meant else text
    return None


def parser() -> Parser:
    """All subcommands and their options; `run` of the result names the function of a command."""
    top = Parser(
        prog="moesys",
        formatter_class=Help,
        description="Launch, choose and measure the training of MoE models.",
        epilog=_epilog("moesys launch configs/quickstart.yaml", "launching.md") + f"\n\n{EXIT_CODES}",
    )
    top.add_argument("--version", action="version", version=f"moesys {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", help="what to do; each has --help")
    _init(commands)
    _launch(_configured(commands, "launch", "train a configuration", "configs/quickstart.yaml train.steps=50"))
    _sweep(commands)
    _config(commands)
    text = "prove that a configuration equals one process"
    _verify(_configured(commands, "verify", text, "configs/quickstart.yaml parallel.tp=2", "choosing-parallelism.md"))
    _import(commands)
    _export(commands)
    _generate(commands)
    _eval(commands)
    _report(commands)
    _what_if(commands)
    _bench(commands)
    return top


def _epilog(example: str, guide: str) -> str:
    return f"example:\n  {example}\n\nguide:\n  {shipped.DOCS / guide}"


def _command(commands: argparse._SubParsersAction[Parser], name: str, text: str, example: str, guide: str) -> Parser:
    """A subcommand without a configuration."""
    program = commands._prog_prefix
    epilog = _epilog(f"{program} {name} {example}", guide)
    sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog)
    sub.formatter_class = Help
    run = f"{program.removeprefix('moesys').strip()} {name}".strip().replace(" ", "_").replace("-", "_")
    sub.set_defaults(run=run, parser=sub, overrides=[], takes_overrides=False)
    return sub


def _configured(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    text: str,
    example: str,
    guide: str = "launching.md",
    what: str = "a YAML file; configs/… may be one that comes with moesys (moesys config --list)",
    optional: bool = False,
) -> Parser:
    """A subcommand of a configuration and overrides of its keys."""
    sub = _command(commands, name, text, example, guide)
    sub.add_argument("config", type=shipped.config, nargs="?" if optional else None, metavar="FILE", help=what)
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the file")
    sub.set_defaults(takes_overrides=True)
    return sub


def _init(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "write a commented configuration to start from"
    sub = _command(commands, "init", text, "mixtral-8x7b --to mine.yaml", "launching.md")
    text = "quickstart, a recipe or a model that comes with moesys (default: list them)"
    sub.add_argument("name", nargs="?", metavar="NAME", help=text)
    text = "the file to write, which must not exist (default: NAME.yaml in this folder)"
    sub.add_argument("--to", type=output, metavar="FILE", help=text)


def _import(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "write the configuration of a released model, and check its files"
    sub = _command(commands, "import", text, "Mixtral-8x7B-v0.1 --to mixtral.yaml", "weights.md")
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="a folder with config.json and safetensors files")
    text = "the file to write, which must not exist (default: the configuration is printed)"
    sub.add_argument("--to", type=output, metavar="FILE", help=text)


def _export(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "write a checkpoint as a folder that transformers, vLLM and SGLang open"
    sub = _command(commands, "export", text, "runs/quickstart --to quickstart-hf", "weights.md")
    text = "a run's folder, of which the newest checkpoint is taken, or a checkpoint"
    sub.add_argument("checkpoint", type=Path, metavar="RUN|CHECKPOINT", help=text)
    sub.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="the folder, which must not exist (no default)"
    )
    text = "type of the weights (default: the one that the run computed in)"
    sub.add_argument("--dtype", choices=("bfloat16", "float32"), help=text)
    sub.add_argument("--shard-size", default="5GB", metavar="SIZE", help="bytes of a file at most: 5GB, 200MB")
    text = "family of the files, by its model_type (default: the released model's, or one that fits)"
    sub.add_argument("--family", metavar="NAME", help=text)


def _launch(sub: Parser) -> None:
    sub.add_argument("--launcher", choices=LAUNCHERS, help="default: launch.launcher")
    sub.add_argument("--ray-address", metavar="HOST:PORT", help="a running Ray cluster (default: launch.ray_address)")
    sub.add_argument("--measure", action="store_true", help="record about twenty steps, unless measure says which")
    text = "serve metrics for Prometheus on this port (default: measure.metrics_port)"
    sub.add_argument("--metrics-port", type=int, metavar="PORT", help=text)
    text = "show ranks, meshes, memory; start nothing; exit code 3 if memory does not fit"
    sub.add_argument("--dry-run", action="store_true", help=text)
    sub.add_argument("--json", type=output, metavar="FILE", help="with --dry-run: write its facts (default: nowhere)")


def _sweep(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "train variations of a configuration and compare them"
    sub = _configured(commands, "sweep", text, "configs/sweeps/gates.yaml train.steps=50", optional=True)
    sub.add_argument("--schema", action="store_true", help="print the JSON schema of sweeps for editors")


def _config(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "print the resolved configuration"
    sub = _configured(commands, "config", text, "configs/quickstart.yaml train.steps=50", optional=True)
    text = "print one line instead: whether it is legal (exit code 0 or 2) and fits in cluster.memory_gib (3 if not)"
    sub.add_argument("--check", action="store_true", help=text)
    sub.add_argument("--schema", action="store_true", help="print the JSON schema for editors")
    sub.add_argument("--list", action="store_true", help="list the configurations that come with moesys")


def _verify(sub: Parser) -> None:
    sub.add_argument("--steps", type=count, default=3, help="training steps")
    text = "largest relative difference (default: 1e-5, 1e-10 in float64, 1e-2 in bfloat16)"
    sub.add_argument("--tolerance", type=tolerance, help=text)
    sub.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="of computation")
    text = "engine of the one process (default: the configuration's)"
    sub.add_argument("--against", choices=("native", "megatron"), help=text)
    _json(sub, "the differences")


MODEL = "a run's folder, for its newest good checkpoint; a checkpoint; or a released model's folder"


def _generate(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "write text with a trained model"
    sub = _command(commands, "generate", text, "runs/quickstart --prompt def", "generate-and-eval.md")
    sub.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|FOLDER", help=MODEL)
    text = "text to go on from; - reads standard input (default: nothing, the beginning of a document)"
    sub.add_argument("--prompt", default="", metavar="TEXT", help=text)
    sub.add_argument("--tokens", type=count, default=256, metavar="N", help="new tokens at most; a document may end")
    text = "divides logits: below 1 the probable becomes more so; 0 takes the most probable token"
    sub.add_argument("--temperature", type=tolerance, default=0.8, metavar="T", help=text)
    text = "draw from the fewest most probable tokens with this probability in sum"
    sub.add_argument("--top-p", type=share, default=0.95, metavar="P", help=text)
    sub.add_argument("--seed", type=seed, default=0, metavar="S", help="another seed draws another text")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it computes")
    sub.add_argument("--only-new", action="store_true", help="print the new text without the prompt")


def _eval(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "losses of a trained model on held-out texts"
    sub = _command(commands, "eval", text, "runs/quickstart train.eval_sequences=64", "generate-and-eval.md")
    sub.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|FOLDER", help=MODEL)
    text = "override keys of the run: data.path, train.seq_len, parallel.ep, …"
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help=text)
    sub.set_defaults(takes_overrides=True)
    text = "a text, file or folder, instead of the run's held-out ones; may come again (default: the run's)"
    sub.add_argument("--data", type=Path, action="append", metavar="PATH", help=text)
    sub.add_argument("--all", action="store_true", help="every sequence instead of train.eval_sequences")
    sub.add_argument("--launcher", choices=LAUNCHERS[:3], help="default: launch.launcher")
    text = "tasks of lm-evaluation-harness, or YAML files of such, instead of losses (default: none)"
    sub.add_argument("--tasks", nargs="+", metavar="NAME", help=text)
    sub.add_argument("--limit", type=count, metavar="N", help="--tasks: examples of each at most (default: all)")
    _json(sub, "the figures")


def _report(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "a run, two runs, or traces of any framework, explained"
    sub = _command(commands, "report", text, "runs/quickstart", "measuring.md")
    text = "one run's folder, or two to compare, or what bench a2a --json wrote"
    sub.add_argument("runs", type=Path, nargs="*", metavar="RUN", help=text)
    text = "traces of torch's profiler, one a rank (default: none)"
    sub.add_argument("--trace", type=Path, nargs="+", metavar="FILE", help=text)
    text = "--trace: kernels without metadata whose names match are all-to-all; none: none is (default: inferred)"
    sub.add_argument("--all-to-all-kernels", metavar="REGEX", help=text)
    text = "the page of two runs or of traces (default: in this folder)"
    sub.add_argument("--out", type=output, metavar="FILE", help=text)
    _json(sub, "the figures")
    text = "write recorded steps as a trace, .json or .json.gz (default: nowhere)"
    sub.add_argument("--perfetto", type=output, metavar="FILE", help=text)
    _links(sub)


def _what_if(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "predict a recorded run's step with other settings"
    sub = _command(commands, "what-if", text, "runs/quickstart --profile links.yaml", "measuring.md")
    sub.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run that recorded steps")
    _links(sub)
    text = "a setting to predict, as in 'parallel.ep=2 parallel.dispatch.chunks=2' (default: a choice of them)"
    sub.add_argument("--change", action="append", metavar="'key=value …'", help=text)
    sub.add_argument("--measure", action="store_true", help="run each setting as well, and show both")


def _json(sub: Parser, what: str) -> None:
    sub.add_argument("--json", type=output, metavar="FILE", help=f"write {what} here (default: nowhere)")


def _links(sub: Parser) -> None:
    text = "links, from bench a2a --profile (default: measure.profile)"
    sub.add_argument("--profile", type=Path, metavar="FILE", help=text)


def _bench(commands: argparse._SubParsersAction[Parser]) -> None:
    group = commands.add_parser("bench", help="benchmarks", description="Benchmarks.", formatter_class=Help)
    group.epilog = _epilog("moesys bench a2a configs/quickstart.yaml", "benchmarks.md")
    text = "what to time; each has --help"
    bench = group.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK", help=text)
    guide, quickstart = "benchmarks.md", "configs/quickstart.yaml"
    text = "training speed beside transformers, and time to the first step"
    _rounds(_configured(bench, "train", text, quickstart, guide), 5, "training steps per round")
    text = "collectives on the ranks of a configuration, as nccl-tests does"
    file = "a YAML file: its cluster, its launcher and its expert groups are used"
    a2a_options(_configured(bench, "a2a", text, f"{quickstart} --profile links.yaml", "measuring.md", what=file))
    text = "what recording communication costs"
    steps = "training steps per round of each side, at least"
    sub = _configured(bench, "measure", text, quickstart, guide)
    _rounds(sub, 15, steps)
    what = "cost for rank 0 of gathering 20 recorded steps of so many ranks, the others played (default: a real run)"
    sub.add_argument("--simulate", type=count, metavar="RANKS", help=what)
    text = "Megatron-Core's model with this project's MoE layer and with its own"
    sub = _configured(bench, "megatron", text, "configs/quickstart-megatron.yaml", guide)
    _rounds(sub, 3, "training steps per round of each side")
    text = "loading of a released model beside transformers and beside reading its bytes"
    sub = _command(bench, "load", text, "--layers 1", guide)
    sub.add_argument("--layers", type=count, default=1, help="of Qwen3-30B-A3B's 48; each is 1.2 GB in files")
    sub.add_argument("--rounds", type=count, default=5, help="repetitions; their median is printed")
    _json(sub, "the figures")
    text = "one MoE layer beside dense products, transformers, Megatron-Core, DeepSpeed"
    _layer(_command(bench, "layer", text, "--shape laptop", guide))


def _rounds(sub: Parser, steps: int, what: str) -> None:
    sub.add_argument("--rounds", type=count, default=7, help="repetitions; their median is printed")
    sub.add_argument("--steps", type=count, default=steps, help=what)
    _json(sub, "the figures")


def _layer(sub: Parser) -> None:
    sub.add_argument("--shape", help="a published shape (default: laptop, with --ranks two-ranks)")
    for name in ("tokens", "hidden", "ffn-hidden", "experts", "top-k"):
        sub.add_argument(f"--{name}", type=int, metavar="N", help="default: the shape's")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: both; on a GPU bfloat16")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it computes")
    sub.add_argument("--ranks", type=int, default=1, help="processes on this machine that share the experts")
    sub.add_argument("--rounds", type=count, help="default: what a minute allows, 3 to 31")
    _json(sub, "the figures")


def a2a_options(sub: Parser) -> None:
    """The options of `moesys bench a2a`."""
    from moesys.measure.a2a_benchmark.sizes import COLLECTIVES, GROUPS, size

    sub.add_argument("--launcher", choices=LAUNCHERS[:3], help="default: launch.launcher")
    text = f"of {', '.join(COLLECTIVES)} (default: all of them)"
    sub.add_argument("--collectives", nargs="+", choices=COLLECTIVES, metavar="NAME", help=text)
    text = "intra: a node's ranks; inter: one of each node; expert; world (default: all of them)"
    sub.add_argument("--groups", nargs="+", choices=GROUPS, help=text)
    types = ("float32", "bfloat16", "float16")
    sub.add_argument("--dtypes", nargs="+", choices=types, default=["float32"], help="of what is sent")
    sub.add_argument("--min", type=size, default=2**10, metavar="SIZE", help="bytes that a rank sends (default: 1K)")
    sub.add_argument("--max", type=size, default=2**30, metavar="SIZE", help="default: 1G, or what memory allows")
    sub.add_argument("--factor", type=int, default=4, help="from one size to the next")
    sub.add_argument("--iterations", type=int, default=20, help="of each size")
    sub.add_argument("--warmup", type=int, default=3, help="iterations before them")
    text = "also uneven all-to-alls: bytes to rank r ∝ 1 / (r + 1)^skew (default: even ones alone)"
    sub.add_argument("--skew", type=finite, help=text)
    text = "also uneven all-to-alls in this pattern of bytes (default: none)"
    sub.add_argument("--matrix", type=Path, metavar="FILE", help=text)
    text = "also uneven all-to-alls as in a run that recorded its routing, output.record_routing (default: none)"
    sub.add_argument("--routing", type=Path, metavar="FOLDER", help=text)
    text = "time these dispatchers with batches of tokens, and collectives only if named (default: collectives)"
    sub.add_argument("--dispatch", nargs="+", choices=list(kinds(DISPATCHERS)), help=text)
    sub.add_argument("--tokens", type=int, default=1024, help="--dispatch: of each rank")
    sub.add_argument("--hidden", type=int, default=1024, help="--dispatch: elements of a token")
    sub.add_argument("--top-k", type=int, default=2, help="--dispatch: experts of a token")
    sub.add_argument("--no-check", dest="check", action="store_false", help="do not validate results")
    sub.add_argument("--plain", action="store_true", help="beside a bare loop around torch's all_to_all_single")
    text = "write the figures here, in the shape of nccl-tests' -J (default: nowhere)"
    sub.add_argument("--json", type=output, metavar="FILE", help=text)
    text = "write the fitted links here, for predictions (default: nowhere)"
    sub.add_argument("--profile", type=output, metavar="FILE", help=text)
