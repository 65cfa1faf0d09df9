"""bilevel_flax: learn hyperparameters while a deep network trains.

A Flax/Optax training-loop plugin for stochastic bilevel optimization,
min_x F(z*(x), x) with z*(x) = argmin_z G(z, x).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bilevel_flax import deprecated, oracles, outer
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
from bilevel_flax.minibatches import masked_mean
from bilevel_flax.oracles import linear_problem
from bilevel_flax.solvers import (
    adjoint_optimisers as adjoint,
)
from bilevel_flax.solvers import (
    amigo,
    auto,
    f2sa,
    first_order,
    implicit,
    saba,
    single_loop,
    soba,
    srba,
    stocbio,
    storm,
    unrolled,
)
from bilevel_flax.solvers.directions import directions

if TYPE_CHECKING:
    from bilevel_flax import checkpoints, contrib, data, diagnostics, nnx, recipes, sharding

__version__ = "0.2.0"

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
    "check_finite",
    "checkpoints",
    "contrib",
    "data",
    "diagnostics",
    "directions",
    "f2sa",
    "first_order",
    "implicit",
    "linear_problem",
    "masked_mean",
    "nnx",
    "oracles",
    "outer",
    "recipes",
    "saba",
    "sharding",
    "single_loop",
    "soba",
    "srba",
    "stocbio",
    "storm",
    "unrolled",
]

# Imported when they are first asked for: flax.nnx alone takes a tenth of a second.
_LATE = ("checkpoints", "contrib", "data", "diagnostics", "nnx", "recipes", "sharding")
_old_name = deprecated.names(__name__)
deprecated.find_old_modules()


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}") if name in _LATE else _old_name(name)


def __dir__() -> list[str]:
    return sorted(__all__)
