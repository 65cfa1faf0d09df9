"""DARTS's search space on MNIST, small enough for a CPU: search, then train what was found.

    bilevel-flax train --config configs/darts_mnist.py --workdir runs/darts_mnist
    python -m examples.darts.retrain --config configs/darts_mnist.py \
        --genotype runs/darts_mnist/genotype.json --workdir runs/darts_mnist/retrained

`bf.auto` by default; `:soba`, `:darts1` and `:darts2` (the paper's first and second order) with
Adam on x. An edge keeps the operation whose removal hurts most (`--config.selection=strongest`:
DARTS's rule); `--config.solver.inner.weight_decay=1e-2`, `--config.stop=residual`: more against a
collapse.

Data: MNIST, through TFDS (`--config.data.manual_dir=DIR` holds the original files).
Hardware: 2 CPU cores. Search: a minute to compile, three CPU minutes; retraining: minutes a seed.
Expected: benchmarks/results/architecture_search.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.solvers import table
from bilevel_flax.train.config import check_choice

SOLVERS = ("auto", "soba", "darts1", "darts2")


def get_config(solver: str = "auto") -> ml_collections.ConfigDict:
    """The config; the argument names the solver."""
    check_choice(f"--config=configs/darts_mnist.py:{solver}", solver, SOLVERS)
    config = ml_collections.ConfigDict()
    config.name = "darts_mnist"
    config.steps = 500
    config.batch_size = 64
    config.log_every = 10
    config.eval_every = 50
    config.checkpoint = {"every": 100, "keep": 2}
    config.health = {"every": 0, "summary": False}
    config.network = {
        "width": 8,
        "cells": 2,
        "reductions": (1,),
        "stem_stride": 4,  # 28 -> 14 -> 7 pixels a side
        "as_matrix": config_dict.placeholder(bool),
    }
    config.selection = "perturbation"
    config.stop = "last"
    config.data = {
        "name": "mnist",
        "manual_dir": config_dict.placeholder(str),
        "data_dir": config_dict.placeholder(str),
        "splits": (10_000, 11_000, 10_000),
        "held_out": 1_000,
        "seed": 0,
    }
    config.retrain = {
        "width": 16,
        "cells": 3,
        "reductions": (1,),
        "stem_stride": 4,
        "splits": (10_000, 50_000, 10_000),  # all of MNIST; the search above sees 21,000 images
        "epochs": 3.0,
        "batch_size": 64,
        "learning_rate": 4e-3,
        "optimizer": "adamw",
        "weight_decay": 3e-4,
        "drop_path": 0.0,
        "cutout": 0,
        "shift": 0,
        "mirror": False,
        "auxiliary": 0.0,
        "examples": config_dict.placeholder(int),
    }
    config.task = {"call": "examples.darts.task:make_task"}
    config.report = "examples.darts.report:sections"
    steps = config.get_oneway_ref("steps")
    inner = {
        "call": "examples.darts.optimizers:make_optimizer",
        "learning_rate": 4e-3,
        "steps": steps,
        "name": "adamw",
    }
    moves_x = {"steps": steps}
    if solver != "auto":
        moves_x = {
            "outer": {
                "call": "optax:adam",
                "learning_rate": 0.01,
                "b1": 0.5,
            }
        }
    config.solver = {"call": table.qualified_name(solver), "inner": inner, **moves_x}
    return config
