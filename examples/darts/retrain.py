"""Train the network of a genotype from scratch, several seeds, and measure its test error.

    python -m examples.darts.retrain --genotype runs/darts_mnist/genotype.json \
        --config configs/darts_mnist.py --workdir runs/darts_mnist/retrained --seeds 3

Settings are those of `config.retrain`; `--config.retrain.drop_path=0.2` overrides one. Finished
seeds are kept in DIR/retrained.json: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bilevel_flax.checks import UserError, check_count
from bilevel_flax.train import config as configs
from examples.darts import draw, genotype
from examples.darts.images import Images, load_images
from examples.darts.training import make_network, train_seeds

_OVERRIDE = "--config."
Job = Callable[[argparse.Namespace, Any, Images], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.darts.retrain", description=__doc__)
    parser.add_argument("--genotype", required=True, type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="default: %(default)s")
    return run(parser, arguments, _retrain)


def _retrain(options: argparse.Namespace, config: Any, images: Images) -> None:
    check_count("--seeds", options.seeds)
    cells = genotype.load(options.genotype)
    make_network(config, cells, images)  # checks before anything is compiled
    options.workdir.mkdir(parents=True, exist_ok=True)
    path = options.workdir / "retrained.json"
    result = train_seeds(config, cells, images, options.seeds, path, say)
    draw.save(options.workdir, cells)
    error, spread = 100 * result["test_error"], 100 * result["test_error_spread"]
    say(
        f"test error {error:.2f} % (spread {spread:.2f}, {len(result['runs'])} seeds), "
        f"{result['parameters']:,} parameters: {path}"
    )


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, job: Job) -> int:
    """A command on a config and its images; a user's mistake is told in one line.

    Args:
        parser: gets `--config` and `--workdir` too.
        arguments: None: the process's.
        job: does the work.

    Returns:
        The exit code.
    """
    parser.add_argument("--config", required=True, metavar="FILE.py")
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR")
    arguments = sys.argv[1:] if arguments is None else arguments
    overrides = [a.removeprefix(_OVERRIDE) for a in arguments if a.startswith(_OVERRIDE)]
    options = parser.parse_args([a for a in arguments if not a.startswith(_OVERRIDE)])
    try:
        config = configs.load(options.config, overrides)
        try:
            images = load_images(config, config.retrain.get("splits"))
        except ValueError as error:  # of the data: unknown, missing, damaged
            raise configs.ConfigError(str(error)) from error
        job(options, config, images)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
