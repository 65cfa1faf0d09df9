"""The command line: `bilevel-flax train | report | solvers`.

A user's mistake ends in one line and exit code 2; with BILEVEL_FLAX_TRACEBACK=1 in the
environment the stack trace is shown too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_OVERRIDE = "--config."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel-flax", description="Learn hyperparameters while a deep network trains."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run a config; the same command again resumes",
        description="Run a config. Any key can be overridden: --config.steps=100. "
        "The same command again resumes; Ctrl-C saves first.",
    )
    train.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    train.add_argument("--workdir", required=True, type=Path, metavar="DIR")
    report = commands.add_parser("report", help="write report.html anew from a run's files")
    report.add_argument("workdir", type=Path, metavar="DIR")
    commands.add_parser("solvers", help="the methods: cost, memory, when to use which")
    return parser


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
    # Imported late: `--help` and a mistyped command must not wait for JAX.
    if arguments.command == "solvers":
        from bilevel_flax import solver_table

        print(solver_table.render())
        return 0
    from bilevel_flax import config, train

    if arguments.command == "report":
        print(train.make_report(arguments.workdir))
        return 0
    loaded = config.load(arguments.config, overrides)
    train.train_and_evaluate(loaded, arguments.workdir)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 1 the run failed, 2 a mistake)."""
    overrides, others = _split_overrides(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(others)
    if overrides and parsed.command != "train":
        print(f"error: {parsed.command} takes no --config overrides", file=sys.stderr)
        return 2
    # The folder the command is given in, as for `python -m`: reports name `examples...`.
    sys.path.insert(0, os.getcwd())
    if os.environ.get("BILEVEL_FLAX_TRACEBACK"):
        return _run(parsed, overrides)
    try:
        return _run(parsed, overrides)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is kept", file=sys.stderr)
        return 130
    except (ValueError, TypeError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        received = getattr(error, "signal", None)
        return 1 if received is None else 128 + int(received)


if __name__ == "__main__":
    sys.exit(main())
