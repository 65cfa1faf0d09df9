"""DARTS's own setting: the search on CIFAR-10, eight cells of 16 channels, 50 epochs.

    bilevel-flax train --config configs/darts_cifar10.py --workdir runs/darts_cifar10
    python -m examples.darts.retrain --config configs/darts_cifar10.py \
        --genotype runs/darts_cifar10/genotype.json --workdir runs/darts_cifar10/retrained

As in the paper: half of the 50,000 training images for each loss (less 1,000 of F's, that neither
sees), batches of 64, momentum with a cosine from .025, weight decay 3e-4, gradients clipped at 5;
retraining with 20 cells of 36 channels, 600 epochs, batches of 96, drop-path .2, cutout 16 and an
auxiliary head of weight .4. Unlike it: x moves by `bf.auto`, with a tracked adjoint; `:soba`,
`:darts1` and `:darts2` take the paper's Adam (3e-4, b1 = .5, decay 1e-3) on x. An edge keeps the
operation whose removal hurts most; `--config.selection=strongest` is the paper's rule.

Hardware: one GPU, or a TPU slice with `--config.mesh=data=8` (the minibatch's statistics are then
taken over all devices; XLA places the reductions). bfloat16 beside float32 masters; a CPU, which
converts to float32 and back, wants `--config.problem.compute_dtype=None`. Not run here: no
accelerator. `bilevel-flax plan --config configs/darts_cifar10.py --topology v5e:2x2` says what
it needs.
Data: CIFAR-10 through TFDS, `--config.data.manual_dir=DIR` holds the original file. A part of it,
as train/CLASS/IMAGE (and test/...) files in DIR or in a cifar10*.tar there, is read as it is: pass
`--config.data.splits=(2500,2500,1000)` and `--config.data.held_out=100` for 5,000 + 1,000 images.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.solvers import table
from bilevel_flax.train.config import check_choice

SOLVERS = ("auto", "soba", "darts1", "darts2")


def get_config(solver: str = "auto") -> ml_collections.ConfigDict:
    """The config; the argument names the solver."""
    check_choice(f"--config=configs/darts_cifar10.py:{solver}", solver, SOLVERS)
    config = ml_collections.ConfigDict()
    config.name = "darts_cifar10"
    config.epochs = 50.0
    config.steps = config_dict.placeholder(int)
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 390
    config.checkpoint = {"every": 1000, "keep": 2}
    config.network = {
        "width": 16,
        "cells": 8,
        "reductions": config_dict.placeholder(tuple),  # None: the paper's, cells 2 and 5
        "stem_stride": 1,
        "as_matrix": False,  # convolutions, wherever it is compiled
    }
    config.selection = "perturbation"
    config.stop = "last"
    config.data = {
        "name": "cifar10",
        "manual_dir": config_dict.placeholder(str),
        "data_dir": config_dict.placeholder(str),
        "splits": (25_000, 25_000, 10_000),
        "held_out": 1_000,
        "seed": 0,
    }
    config.retrain = {
        "width": 36,
        "cells": 20,
        "reductions": config_dict.placeholder(tuple),
        "stem_stride": 1,
        "splits": config_dict.placeholder(tuple),  # None: the search's, which is all of it
        "epochs": 600.0,
        "batch_size": 96,
        "learning_rate": 0.025,
        "optimizer": "momentum",
        "weight_decay": 3e-4,
        "drop_path": 0.2,
        "cutout": 16,
        "shift": 4,
        "mirror": True,
        "auxiliary": 0.4,
        "examples": config_dict.placeholder(int),
    }
    config.task = {"call": "examples.darts.task:make_task"}
    config.problem = {"compute_dtype": "bfloat16"}
    config.report = "examples.darts.report:sections"
    steps = config.get_oneway_ref("steps")
    inner = {
        "call": "examples.darts.optimizers:make_optimizer",
        "learning_rate": 0.025,
        "steps": steps,
        "name": "momentum",
    }
    moves_x = {"steps": steps}
    if solver != "auto":
        moves_x = {
            "outer": {
                "call": "optax:adamw",
                "learning_rate": 3e-4,
                "b1": 0.5,
                "weight_decay": 1e-3,
            }
        }
    config.solver = {"call": table.qualified_name(solver), "inner": inner, **moves_x}
    return config
