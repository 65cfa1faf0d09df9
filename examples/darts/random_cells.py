"""Random cells of the space, each trained as `retrain` trains a derived one: the bar to pass.

    python -m examples.darts.random_cells --config configs/darts_mnist.py \
        --workdir runs/darts_mnist/random --cells 8 --against runs/darts_mnist/retrained

A search that finds nothing better than the median of random cells has found nothing. Finished
networks are kept in DIR: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_flax.checks import check_count
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.workdir import read_json, write_json
from examples.darts.genotype import random_genotype
from examples.darts.images import Images
from examples.darts.retrain import run, say
from examples.darts.training import train_seeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.darts.random_cells", description=__doc__
    )
    parser.add_argument("--cells", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="default: %(default)s")
    parser.add_argument("--against", type=Path, metavar="DIR", help="the --workdir of a retraining")
    return run(parser, arguments, _train_all)


def _train_all(options: argparse.Namespace, config: Any, images: Images) -> None:
    for name in ("cells", "seeds"):
        check_count(f"--{name}", getattr(options, name))
    rival = None if options.against is None else options.against / "retrained.json"
    if rival is not None and not rival.is_file():
        raise ConfigError(f"--against={options.against}: no retrained.json there")
    options.workdir.mkdir(parents=True, exist_ok=True)
    errors = []
    for cell in range(options.cells):
        say(f"random cell {cell} of {options.cells}")
        path = options.workdir / f"cell_{cell}.json"
        result = train_seeds(config, random_genotype(cell), images, options.seeds, path, say)
        errors.append(result["test_error"])
    summary = {"test_errors": errors, "median_test_error": float(np.median(errors))}
    line = f"median of {len(errors)} random cells: {100 * np.median(errors):.2f} %"
    if rival is not None:
        ours = read_json(rival)["test_error"]
        summary |= {"against": ours, "better_than_median": bool(ours < np.median(errors))}
        beaten = sum(error > ours for error in errors)
        line += f"; against {100 * ours:.2f} %, better than {beaten} of them"
    write_json(options.workdir / "random_cells.json", summary)
    say(line)


if __name__ == "__main__":
    sys.exit(main())
