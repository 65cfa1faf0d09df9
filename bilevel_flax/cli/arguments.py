"""What the command line takes."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OVERRIDE = "--config."


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    top = argparse.ArgumentParser(
        prog="bilevel-flax", description="Learn hyperparameters while a deep network trains."
    )
    top.add_argument("--version", action=_Version, nargs=0, help="of this and of what it runs on")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    new = commands.add_parser(
        "new",
        help="copy a config and its example into a folder, to be edited; no NAME: what there is",
        description="Copy a config and the example that it names into DIR, ready to be edited. "
        "Without NAME: what there is.",
    )
    new.add_argument("name", nargs="?", metavar="NAME")
    new.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR")
    train = commands.add_parser(
        "train",
        help="run a config; the same command again resumes",
        description="Run a config. Any key can be overridden: --config.steps=100. "
        "The same command again resumes; Ctrl-C saves first.",
    )
    train.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    train.add_argument("--workdir", required=True, type=_path, metavar="DIR")
    together = train.add_argument_group("many processes, one run (docs/multi_host.md)")
    together.add_argument(
        "--distributed", action="store_true", help="the cluster says how many and who (TPU, SLURM)"
    )
    together.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    together.add_argument("--num-processes", type=int, metavar="N")
    together.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    report = commands.add_parser("report", help="write report.html anew from a run's files")
    report.add_argument("workdir", type=_path, metavar="DIR")
    report.add_argument(
        "--trust",
        action="store_true",
        help="run the sections that DIR/config.json names out of the working directory's modules",
    )
    _add_mixture(commands)
    _add_bench(commands)
    _add_plan(commands)
    commands.add_parser("solvers", help="the methods: cost, memory, when to use which")
    return top


class _Version(argparse.Action):
    """`--version`: the line that a report of a bug needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        import bilevel_flax

        stack = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
        print(
            f"bilevel-flax {bilevel_flax.__version__} (Python {platform.python_version()}, {stack})"
        )
        parser.exit()


def _path(given: str) -> Path:
    if not given:  # a shell's variable that was not set; Path("") is where one stands
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(given)


def _add_mixture(commands: Any) -> None:
    mixture = commands.add_parser(
        "mixture",
        help="a run's learned mixture for MaxText, Levanter or datasets (docs/mixture_export.md)",
        description="Write the mixture that a run learned, its end point and its curriculum, in a "
        "reader's format. Nothing in the run's folder is executed.",
    )
    mixture.add_argument("workdir", type=_path, metavar="RUN")
    mixture.add_argument("--to", required=True, metavar="maxtext|levanter|datasets|json")
    mixture.add_argument("--out", required=True, type=_path, metavar="FILE")
    mixture.add_argument(
        "--reader",
        type=Path,
        metavar="FILE",
        help="JSON of the reader's: its domains, in its order, with its paths",
    )
    mixture.add_argument("--tokens", type=int, metavar="N", help="of the reader's run")
    mixture.add_argument("--length", type=int, metavar="L", help="tokens of a sequence of it")
    mixture.add_argument("--stages", type=int, default=8, metavar="K", help="default: %(default)s")
    mixture.add_argument(
        "--stage", type=int, metavar="I", help="of K, where the reader takes one; default: the end"
    )
    mixture.add_argument(
        "--block-size", type=int, default=2048, metavar="B", help="Levanter's; default: %(default)s"
    )


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="compare methods on a task: one budget, one protocol; the same command resumes",
        description="Compare methods on a task (quadratics, breast_cancer, ijcnn1, covtype, "
        "mnist_hypercleaning, darts_micro, cleaning) and write results.csv and bench.html. The "
        "same command resumes.",
    )
    bench.add_argument("task", metavar="TASK")
    bench.add_argument(
        "--solvers",
        metavar="A,B,...",
        help="default: soba,saba,srba,amigo; darts_micro: soba,darts1,darts2; cleaning: all rivals",
    )
    bench.add_argument("--seconds", type=float, metavar="S", help="of a run; default: the task's")
    bench.add_argument("--seeds", type=int, metavar="K", help="default: 1; darts_micro: 10")
    bench.add_argument(
        "--grid",
        type=int,
        default=0,
        metavar="N",
        help="each method chooses from N pairs of steps (up to 63); 0, the default: recorded ones",
    )
    bench.add_argument("--out", type=_path, metavar="DIR", help="default: runs/bench/TASK")
    bench.add_argument("--manual-dir", metavar="DIR", help="folder of original data files")
    bench.add_argument(
        "--clock", default="wall", metavar="wall|cpu", help="what S is counted in; default: wall"
    )
    bench.add_argument(
        "--markdown", action="store_true", help="print tables in Markdown, with what was run where"
    )
    cleaning = bench.add_argument_group("cleaning alone: lists, of which all pairs are run")
    cleaning.add_argument("--clean", metavar="N,...", help="clean examples; default: 500,100")
    cleaning.add_argument(
        "--noise",
        metavar="A,...",
        help="symmetric, class, instance, or symmetric:0.1; default: all three (half, .4, .4)",
    )
    cleaning.add_argument("--model", metavar="A,...", help="linear, mlp, cnn; default: cnn")
    cleaning.add_argument(
        "--data", metavar="A,...", help="as config.data.name of mnist_hypercleaning; mnist5k"
    )
    cleaning.add_argument("--steps", metavar="N", help="of a training; default: 1000")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a config's step needs on a pod: memory, FLOPs, collectives; does it fit",
        description="Compile a config's step for a TPU topology that need not be there (with "
        "libtpu: pip install 'bilevel-flax[plan]'), or for virtual CPU devices, and say what each "
        "chip needs. Any key can be overridden: --config.batch_size=512.",
    )
    plan.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="v5e:16x16, v5p:8x8x8, cpu:8 ..."
    )
    plan.add_argument("--mesh", metavar="AXES", help="data=16,fsdp=16; default: the config's")
    plan.add_argument("--json", action="store_true", help="print one JSON object")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides without the prefix, all other arguments)."""
    overrides, others = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith(_OVERRIDE):
            others.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix(_OVERRIDE))
        else:
            value = next(waiting, "")
            overrides.append(f"{argument.removeprefix(_OVERRIDE)}={value}")
    return overrides, others
