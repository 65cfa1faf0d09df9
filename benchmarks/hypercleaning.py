"""The published MNIST hypercleaning task, one default config for all corruptions.

    python benchmarks/hypercleaning.py --manual-dir DIR --out runs/hypercleaning [--seeds 3]

DIR holds the four original MNIST files. Every run goes through the `train` command's own code and
resumes; the table is made from the runs' summary.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.rows import Rows, add_argument
from bilevel_flax.train import config as configs
from bilevel_flax.train.experiment import train_and_evaluate

CONFIG = Path(__file__).parent.parent / "configs" / "mnist_hypercleaning.py"
CORRUPTIONS = (0.5, 0.7, 0.9)
# Best of a grid of step sizes for each p, SABA (REFERENCES.md section 3).
PUBLISHED = {0.5: 0.136, 0.7: 0.143, 0.9: 0.171}
COLUMNS = (
    "test_error",
    "wrong_label_auc",
    "test_error_retrained",
    "test_error_refit",
    "test_error_no_weights",
    "test_error_validation_only",
    "test_error_clean",
)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--manual-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--solver", default="soba")
    parser.add_argument("--no-baselines", action="store_true")
    add_argument(parser)
    options = parser.parse_args()
    with Rows(options.markdown) as rows:
        for p in CORRUPTIONS:
            rows.add(reached(p, options))


def reached(p: float, options: argparse.Namespace) -> dict[str, str]:
    """Runs what is missing for one corruption; its row, means and deviations over the seeds."""
    summaries = []
    for seed in range(options.seeds):
        workdir = options.out / f"{options.solver}_p{p}_seed{seed}"
        overrides = [
            "data.name=mnist",
            f"data.manual_dir={options.manual_dir}",
            f"data.data_dir={options.out / 'data'}",
            f"corruption={p}",
            f"seed={seed}",
            f"baselines={not options.no_baselines}",
        ]
        if not (workdir / "summary.json").exists():
            train_and_evaluate(configs.load(f"{CONFIG}:{options.solver}", overrides), workdir)
        summaries.append(json.loads((workdir / "summary.json").read_text()))
    row = {"p": str(p), "published": f"{100 * PUBLISHED[p]:.1f}"}
    for column in COLUMNS[:2] if options.no_baselines else COLUMNS:
        values = np.array([summary[column] for summary in summaries])
        scale, digits = (1, 3) if column == "wrong_label_auc" else (100, 2)
        mean, deviation = (scale * of() for of in (values.mean, values.std))
        row[column] = f"{mean:.{digits}f} ± {deviation:.{digits}f}"
    return row


if __name__ == "__main__":
    main()
