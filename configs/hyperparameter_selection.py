"""Hyperparameter selection: one l2 penalty for each feature of a linear classifier.

    bilevel-flax train --config configs/hyperparameter_selection.py:saba --workdir runs/penalties
    bilevel-flax train --config configs/hyperparameter_selection.py:saba --workdir runs/ijcnn1 \
        --config.data.name=ijcnn1 --config.data.manual_dir=DIR --config.steps=1000000

Hardware: any CPU. breast_cancer (the default, bundled with scikit-learn): seconds. ijcnn1 (DIR
holds ijcnn1.trn.bz2 and ijcnn1.tst.bz2): about 10 s a million steps; see benchmarks/README.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.config import ConfigError, nearest

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

OPTIMIZERS = "examples.hyperparameter_selection.optimizers"


def get_config(solver: str = "saba") -> ml_collections.ConfigDict:
    """The config; the argument names the solver."""
    if solver not in SOLVERS:
        raise ConfigError(
            f"--config=configs/hyperparameter_selection.py:{solver}: choose one of "
            f"{', '.join(SOLVERS)}{nearest(solver, list(SOLVERS))}"
        )
    config = ml_collections.ConfigDict()
    config.name = "hyperparameter_selection"
    config.seed = 0
    config.steps = 200_000
    config.batch_size = 64
    config.start = -3.0
    config.optimum = True
    config.log_every = 10_000
    config.eval_every = 20_000
    config.checkpoint = {"every": 100_000, "keep": 3}
    config.on_device = config_dict.placeholder(bool)
    config.data = {
        "name": "breast_cancer",
        "manual_dir": config_dict.placeholder(str),
        "seed": 0,
    }
    config.task = {"call": "examples.hyperparameter_selection.task:make_task"}
    config.report = config_dict.placeholder(str)
    config.solver = {
        "call": f"bilevel_flax:{solver}",
        "inner": {"call": f"{OPTIMIZERS}:penalty_aware_sgd", "learning_rate": 8.0},
        "outer": {
            "call": f"{OPTIMIZERS}:penalty_adam",
            "learning_rate": 0.01,
            "patience": 20_000.0,
        },
        **SOLVERS[solver],
    }
    return config
