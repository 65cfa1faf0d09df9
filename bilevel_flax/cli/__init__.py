"""The command line: `bilevel-flax new | train | report | mixture | bench | plan | solvers`."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bilevel_flax.cli.arguments import parser, split_overrides
from bilevel_flax.cli.verdict import verdict
from bilevel_flax.distribution import recipes, shipped

_EXIT_SECONDS = 1.0  # of what a signal has ended already


def _new(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Copies a recipe, or lists them."""
    del overrides
    name, folder = arguments.name, arguments.folder
    if name is None:
        print(recipes.table())
        print("\nbilevel-flax new NAME [DIR] copies one into DIR, ready to be edited")
        return 0
    files = recipes.copy(name, folder.expanduser())
    print("\n".join(map(str, files)) or f"{name} is there already, unchanged")
    there = "" if folder == Path() else f"cd {folder}\n    "
    print(f"\nnow:\n    {there}{recipes.command(name)}")
    return 0


def _solvers(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from bilevel_flax.solvers import table

    del arguments, overrides
    print(table.render())
    return 0


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from bilevel_flax import plan

    names = arguments.config, arguments.topology, arguments.mesh
    return plan.run(plan.Options(*names, tuple(overrides), arguments.json))


def _bench(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from bilevel_flax import bench

    del overrides
    names = {field.name for field in fields(bench.Options)} - {"choices"}
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if given["solvers"] is not None:
        given["solvers"] = tuple(filter(None, given["solvers"].split(",")))
    given["out"] = (given["out"] or Path("runs", "bench", arguments.task)).expanduser()
    lists = ((name, getattr(arguments, name)) for name in bench.CHOICES)
    given["choices"] = {name: value for name, value in lists if value is not None}
    bench.run(bench.Options(**given))
    return 0


def _mixture(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from bilevel_flax.train import mixture

    del overrides
    given: dict[str, Any] = {
        field.name: getattr(arguments, field.name) for field in fields(mixture.Options)
    }
    given |= {name: v.expanduser() for name, v in given.items() if isinstance(v, Path)}
    print(mixture.export(mixture.Options(**given)))
    return 0


def _report(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from bilevel_flax.train import experiment

    del overrides
    print(experiment.make_report(arguments.workdir.expanduser(), trust=arguments.trust))
    return 0


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from bilevel_flax.train import config, experiment, multihost

    multihost.start(_processes(arguments))
    # Loaded by all or by none: a slip in one process's command ends all of them at once.
    loaded = multihost.Channel("config").run_on_each(
        lambda: config.load(arguments.config, overrides)
    )
    experiment.train_and_evaluate(loaded, arguments.workdir.expanduser())
    return 0


# Each imports what it needs, and no more: `new` and `--version` are there at once.
_COMMANDS = {
    "new": _new,
    "train": _train,
    "report": _report,
    "mixture": _mixture,
    "bench": _bench,
    "plan": _plan,
    "solvers": _solvers,
}


def _processes(arguments: argparse.Namespace) -> Any:
    """What `multihost.start` wants to know."""
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
    overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parsed = parser().parse_args(others)
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
            code = _COMMANDS[parsed.command](parsed, overrides)
    except (Exception, KeyboardInterrupt) as error:
        message, code = verdict(error)
        if arguments is None and code > 128:
            _exit_within(_EXIT_SECONDS, code)
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
        from bilevel_flax.train import multihost

        multihost.leave(code)
    return code


def _exit_within(seconds: float, code: int) -> None:
    """Ends a program that a signal ends, whatever its exit handlers or a full pipe wait for."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
