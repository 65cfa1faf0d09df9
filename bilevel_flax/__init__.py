"""bilevel_flax: learn hyperparameters while a deep network trains.

A Flax/Optax training-loop plugin for stochastic bilevel optimization,
min_x F(z*(x), x) with z*(x) = argmin_z G(z, x).
"""

from bilevel_flax import adjoint, diagnostics, nnx, oracles, outer, sharding
from bilevel_flax.auto import auto
from bilevel_flax.base import (
    Aux,
    Batch,
    BilevelSolver,
    Estimator,
    Info,
    Oracles,
    Problem,
    Rows,
    Table,
    TrainState,
    Variables,
)
from bilevel_flax.checks import check_finite
from bilevel_flax.linear import linear_problem
from bilevel_flax.losses import masked_mean
from bilevel_flax.single_loop import single_loop
from bilevel_flax.solvers import (
    amigo,
    bsa,
    bsg,
    bsgo,
    darts1,
    darts2,
    f2sa,
    fsla,
    grid_search,
    implicit,
    masoba,
    mrbo,
    random_search,
    saba,
    soba,
    spaba,
    srba,
    stocbio,
    storm,
    sustain,
    ttsa,
    unrolled,
    vrbo,
)

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "Batch",
    "BilevelSolver",
    "Estimator",
    "Info",
    "Oracles",
    "Problem",
    "Rows",
    "Table",
    "TrainState",
    "Variables",
    "adjoint",
    "amigo",
    "auto",
    "bsa",
    "bsg",
    "bsgo",
    "check_finite",
    "darts1",
    "darts2",
    "diagnostics",
    "f2sa",
    "fsla",
    "grid_search",
    "implicit",
    "linear_problem",
    "masked_mean",
    "masoba",
    "mrbo",
    "nnx",
    "oracles",
    "outer",
    "random_search",
    "saba",
    "sharding",
    "single_loop",
    "soba",
    "spaba",
    "srba",
    "stocbio",
    "storm",
    "sustain",
    "ttsa",
    "unrolled",
    "vrbo",
]
