"""The command line: `bilevel-flax new | train | report | mixture | bench | plan | solvers`.

What ends in one line, and what in a stack trace:

* A `UserError`, and any other ValueError, TypeError or OSError that a `raise` statement of the
  project's own code (the package, the example, the config) made, was written for the user: one
  line, exit code 2.
* A run that fails as a whole says why in one line: a direction that is not finite, a checkpoint
  that cannot be written, a full disk (1); an interruption (130, 143).
* Everything else, a ValueError out of NumPy or JAX included, is a bug here or in the task, and is
  shown with its stack trace (1).

With BILEVEL_FLAX_TRACEBACK=1 in the environment the stack trace is always shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_flax.distribution import extras, recipes, shipped

_OVERRIDE = "--config."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel-flax", description="Learn hyperparameters while a deep network trains."
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="of this and of what it runs on"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    train.add_argument("--workdir", required=True, type=Path, metavar="DIR")
    together = train.add_argument_group("many processes, one run (docs/multi_host.md)")
    together.add_argument(
        "--distributed", action="store_true", help="the cluster says how many and who (TPU, SLURM)"
    )
    together.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    together.add_argument("--num-processes", type=int, metavar="N")
    together.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    report = commands.add_parser("report", help="write report.html anew from a run's files")
    report.add_argument("workdir", type=Path, metavar="DIR")
    report.add_argument(
        "--trust",
        action="store_true",
        help="run the sections that DIR/config.json names out of the working directory's modules",
    )
    _add_mixture(commands)
    _add_bench(commands)
    _add_plan(commands)
    commands.add_parser("solvers", help="the methods: cost, memory, when to use which")
    return parser


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


def _new(name: str | None, folder: Path) -> None:
    """Copies a recipe, or lists them."""
    if name is None:
        print(recipes.table())
        print("\nbilevel-flax new NAME [DIR] copies one into DIR, ready to be edited")
        return
    files = recipes.copy(name, folder.expanduser())
    print("\n".join(map(str, files)) or f"{name} is there already, unchanged")
    there = "" if folder == Path() else f"cd {folder}\n    "
    print(f"\nnow:\n    {there}{recipes.command(name)}")


def _add_mixture(commands: Any) -> None:
    mixture = commands.add_parser(
        "mixture",
        help="a run's learned mixture for MaxText, Levanter or datasets (docs/mixture_export.md)",
        description="Write the mixture that a run learned, its end point and its curriculum, in a "
        "reader's format. Nothing in the run's folder is executed.",
    )
    mixture.add_argument("workdir", type=Path, metavar="RUN")
    mixture.add_argument("--to", required=True, metavar="maxtext|levanter|datasets|json")
    mixture.add_argument("--out", required=True, type=Path, metavar="FILE")
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
    bench.add_argument("--out", type=Path, metavar="DIR", help="default: runs/bench/TASK")
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
        "--noise", metavar="A,...", help="symmetric, class, instance; default: all three"
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


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
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


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    if arguments.command == "new":
        _new(arguments.name, arguments.folder)
        return 0
    if arguments.command == "solvers":
        from bilevel_flax.solvers import table as solver_table

        print(solver_table.render())
        return 0
    if arguments.command == "plan":
        from bilevel_flax import plan

        return plan.run(
            plan.Options(
                arguments.config,
                arguments.topology,
                arguments.mesh,
                tuple(overrides),
                arguments.json,
            )
        )
    if arguments.command == "bench":
        from bilevel_flax import bench

        bench.run(
            bench.Options(
                task=arguments.task,
                solvers=None
                if arguments.solvers is None
                else tuple(filter(None, arguments.solvers.split(","))),
                out=(arguments.out or Path("runs", "bench", arguments.task)).expanduser(),
                seconds=arguments.seconds,
                seeds=arguments.seeds,
                grid=arguments.grid,
                manual_dir=arguments.manual_dir,
                clock=arguments.clock,
                markdown=arguments.markdown,
                choices={
                    name: value
                    for name in bench.CHOICES
                    if (value := getattr(arguments, name)) is not None
                },
            )
        )
        return 0
    if arguments.command == "mixture":
        from bilevel_flax.train import mixture

        given: dict[str, Any] = {
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(mixture.Options)
        }
        given |= {name: v.expanduser() for name, v in given.items() if isinstance(v, Path)}
        print(mixture.export(mixture.Options(**given)))
        return 0
    from bilevel_flax.train import config
    from bilevel_flax.train import experiment as train
    from bilevel_flax.train import multihost as distributed

    if arguments.command == "report":
        print(train.make_report(arguments.workdir.expanduser(), trust=arguments.trust))
        return 0
    distributed.start(_processes(arguments))
    # Loaded by all or by none: a slip in one process's command ends all of them at once.
    loaded = distributed.Channel("config").run_on_each(
        lambda: config.load(arguments.config, overrides)
    )
    train.train_and_evaluate(loaded, arguments.workdir.expanduser())
    return 0


def _processes(arguments: argparse.Namespace) -> Any:
    """What `distributed.start` wants to know."""
    given = {
        "coordinator": arguments.coordinator,
        "num_processes": arguments.num_processes,
        "process_id": arguments.process_id,
    }
    if any(value is not None for value in given.values()):
        return given
    return "auto" if arguments.distributed else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 1 the run failed, 2 a mistake)."""
    overrides, others = _split_overrides(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(others)
    if overrides and parsed.command not in ("train", "plan"):
        print(f"error: {parsed.command} takes no --config overrides", file=sys.stderr)
        return 2
    # The folder the command is given in, as for `python -m`: configs name `examples...`. A report
    # is made of a folder that may be somebody else's, and one may stand in it.
    if parsed.command != "mixture" and (parsed.command != "report" or parsed.trust):
        sys.path.insert(0, os.getcwd())
    shipped.make_importable()
    try:
        with warnings.catch_warnings():
            # Python hides the warning of an old key from whoever gives a command.
            warnings.filterwarnings("always", r"config\.", DeprecationWarning)
            warnings.showwarning = _show_warning
            code = _run(parsed, overrides)
    except (Exception, KeyboardInterrupt) as error:
        message, code = _verdict(error)
        if message is None or os.environ.get("BILEVEL_FLAX_TRACEBACK"):
            traceback.print_exception(error)
        print(
            message
            or "error: the above is a bug in bilevel_flax or in the task, not a mistake in the "
            "command; the last checkpoint is kept",
            file=sys.stderr,
            flush=True,
        )
    if parsed.command == "train" and "bilevel_flax.train.multihost" in sys.modules:
        from bilevel_flax.train import multihost as distributed

        distributed.leave(code)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _verdict(error: BaseException) -> tuple[str | None, int]:
    """(the line that says all, or None where a stack trace is needed; the exit code)."""
    if missing := extras.explain(error):
        return f"error: {missing}", 2
    if isinstance(error, recipes.RecipeError):
        return f"error: {error}", 2
    from bilevel_flax.checkpoints.checkpointer import CheckpointError
    from bilevel_flax.checks import UserError
    from bilevel_flax.train.errors import Diverged, Interrupted
    from bilevel_flax.train.multihost import PeerError
    from bilevel_flax.train.workdir import DiskFullError

    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint", 130
    if isinstance(error, Interrupted):
        return str(error), 128 + error.signal
    if isinstance(error, Diverged | CheckpointError | DiskFullError | PeerError):
        return f"error: {error}", 1
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, ValueError | TypeError | OSError) and _is_raised_by_us(error):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        return f"error: {error} (BILEVEL_FLAX_TRACEBACK=1 shows where)", 1
    return None, 1


def _is_raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of this project made it, not Python or an installed package."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    frame, code = last.tb_frame, last.tb_frame.f_code
    module = frame.f_globals.get("__name__", "").partition(".")[0]
    foreign = module in sys.stdlib_module_names or {"site-packages", "dist-packages"} & set(
        Path(code.co_filename).parts
    )
    # int("x") of a task's own line has that line as its last frame too, but it raised nothing.
    is_raise = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    ours = module == "bilevel_flax" or Path(code.co_filename).is_relative_to(shipped.root())
    return is_raise and (ours or not foreign)


if __name__ == "__main__":
    sys.exit(main())
