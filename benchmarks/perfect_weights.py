"""How much of a cleaning run's gap to the true labels its weights are to blame for.

    python benchmarks/perfect_weights.py --config configs/mnist_hypercleaning.py --run runs/cnn \
        --set model=cnn data.name=mnist data.manual_dir=DATA/mnist seed=3 steps=3000

Trains from scratch, stopped early on validation data as the run's baselines, with the weights that
the run learned (its `learned.npz`), with these cut to 0 or 1, with 0 for the wrong labels and 1 for
the right ones (which nobody could know), and on the true labels. The settings must give the split
of the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.rows import Rows, add_argument
from bilevel_flax.train import config as configs
from examples.mnist_hypercleaning import baselines, task
from examples.mnist_hypercleaning.model import error, make_model

CUT = 0.3
_NEAR = 1e-6  # sigmoid weights of 0 and 1, but for this


def main() -> None:
    """Reads the command line and prints validation and test error of each training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    add_argument(parser)
    options = parser.parse_args()
    config = configs.load(options.config, options.set)
    examples = task.load_examples(config)
    if config.steps is None:
        config.steps = round(config.epochs * -(-len(examples.given_labels) // config.batch_size))
    with np.load(options.run / "learned.npz", allow_pickle=False) as learned_file:
        learned, wrong = learned_file["weights"], learned_file["is_wrong"]
        if not np.array_equal(learned_file["given_label"], examples.given_labels):
            raise SystemExit(f"--run={options.run} has other labels: pass the settings of that run")
    model = make_model(config.model, examples.num_classes)
    weights = task.PARAMETRISATIONS["sigmoid"](len(wrong))
    problem = task.make_problem(model, weights, task.REGULARIZATION[config.model])
    train = baselines.Trainer(config, model, task.make_task(config, examples).init)
    held = (examples.validation_images, examples.validation_labels)
    cases = (
        ("true labels", np.ones(len(wrong)), examples.true_labels),
        ("wrong ones 0, right ones 1", ~wrong, examples.given_labels),
        ("learned", learned, examples.given_labels),
        (f"learned, cut at {CUT}", learned > CUT, examples.given_labels),
    )
    with Rows(options.markdown) as rows:
        for name, values, labels in cases:
            share = np.clip(np.asarray(values, np.float32), _NEAR, 1 - _NEAR)
            x = np.log(share / (1 - share)).astype(np.float32)
            parts = {"image": examples.train_images, "label": labels}
            state, step = train(problem, x, parts, held)
            tested = error(model, state, examples.test_images, examples.test_labels)
            row = {"weights": name, "validation error": f"{error(model, state, *held):.4f}"}
            rows.add({**row, "test error": f"{tested:.4f}", "step": step})


if __name__ == "__main__":
    main()
