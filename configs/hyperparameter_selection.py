"""Hyperparameter selection: one l2 penalty for each feature of a linear classifier.

    bilevel-flax train --config configs/hyperparameter_selection.py:saba --workdir runs/penalties
    bilevel-flax train --config configs/hyperparameter_selection.py:saba,ijcnn1 \
        --workdir runs/ijcnn1 --config.data.manual_dir=DIR

The argument is SOLVER or SOLVER,DATA; the data set brings its step ρ and its box for x.

Hardware: any CPU. breast_cancer (the default, bundled with scikit-learn): seconds. ijcnn1 (DIR
holds ijcnn1.trn.bz2 and ijcnn1.tst.bz2; without it they are fetched): 200,000 steps take about 3 s
of CPU time, and h - h* is then below 1e-6; with JAX_ENABLE_X64=1 and --config.steps=1000000 below
1e-9 (about 12 s; chosen on seed 0: benchmarks/results/hyperparameter_selection.md). The
optimum to compare with takes longer (--config.optimum=False leaves it out).
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.solvers import table
from bilevel_flax.train.config import check_choice

# The single-loop methods, with what each wants beside the optimisers.
SOLVERS = {
    "soba": {},
    "saba": {},
    "srba": {"period": 1000},
    "spaba": {"probability": 0.001},
    "masoba": {},
    "storm": {},
    "fsla": {},
}

# ρ, about half the inverse of the curvature, and the box for x (see examples' exact.py).
DATA = {
    "breast_cancer": (0.5, (-8.0, 12.0)),
    "ijcnn1": (8.0, (-25.0, 12.0)),
    "covtype": (0.25, (-25.0, 12.0)),
    "covtype10k": (0.25, (-25.0, 12.0)),
}

OPTIMIZERS = "examples.hyperparameter_selection.optimizers"


def get_config(arg: str = "saba") -> ml_collections.ConfigDict:
    """The config; the argument names the solver and, after a comma, the data."""
    solver, _, name = arg.partition(",")
    name = name or "breast_cancer"
    for given, known in ((solver, SOLVERS), (name, DATA)):
        check_choice(f"--config=configs/hyperparameter_selection.py:{arg}: {given}", given, known)
    rho, bounds = DATA[name]
    config = ml_collections.ConfigDict()
    config.name = "hyperparameter_selection"
    config.steps = 200_000
    config.batch_size = 64
    config.start = -3.0
    config.bounds = bounds
    config.optimum = True
    config.log_every = 10_000
    config.eval_every = 20_000
    config.checkpoint = {"every": 100_000}
    config.data = {
        "name": name,
        "manual_dir": config_dict.placeholder(str),
        "data_dir": config_dict.placeholder(str),  # of prepared sets; None: TFDS's own
        "seed": 0,
    }
    config.task = {"call": "examples.hyperparameter_selection.task:make_task"}
    config.solver = {
        "call": table.qualified_name(solver),
        "inner": {"call": f"{OPTIMIZERS}:penalty_aware_sgd", "learning_rate": rho},
        "outer": {
            "call": f"{OPTIMIZERS}:penalty_adam",
            "learning_rate": 0.032,
            "patience": 10_000.0,
            "low": bounds[0],
            "high": bounds[1],
        },
        **SOLVERS[solver],
    }
    return config
