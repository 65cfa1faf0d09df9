"""The types and protocols of the library; no computation happens here.

A bilevel problem is

    min_x  h(x) = F(z*(x), x)      with      z*(x) = argmin_z G(z, x)

with z the inner parameters, x the outer parameters and v the adjoint, the solution of
∇²₁₁G v = -∇₁F. At one point (z, v, x) the three directions of a single-loop method are

    D_z = ∇₁G        D_v = ∇²₁₁G v + ∇₁F        D_x = ∇²₂₁G v + ∇₂F

and ∇h(x) = D_x at (z*(x), v*(x), x).

`PyTree` and `Metrics` are aliases of types, `DERIVATIVES` the values of `Problem(derivatives=)`;
`NEVER` is what `BilevelSolver.next_refresh` returns where no full pass will ever be due.

References:
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms. NeurIPS 2022.
"""

from __future__ import annotations

from bilevel_flax.base.estimator import Estimate, Estimator, FullPass
from bilevel_flax.base.problem import DERIVATIVES, Aux, Problem
from bilevel_flax.base.solver import NEVER, BilevelSolver, Finite, Info, Init, Method, TrainState
from bilevel_flax.base.variables import Batch, Metrics, Oracles, PyTree, Rows, Table, Variables

__all__ = [
    "Aux",
    "Batch",
    "BilevelSolver",
    "DERIVATIVES",
    "Estimate",
    "Estimator",
    "Finite",
    "FullPass",
    "Info",
    "Init",
    "Method",
    "Metrics",
    "NEVER",
    "Oracles",
    "Problem",
    "PyTree",
    "Rows",
    "Table",
    "TrainState",
    "Variables",
]
