"""How good is the hypergradient: full directions, the adjoint's residual, a reference."""

from bilevel_flax.diagnostics.hypergradient import HypergradientCheck, hypergradient_check
from bilevel_flax.diagnostics.influence import Influence, influence
from bilevel_flax.diagnostics.means import check_means
from bilevel_flax.diagnostics.residual import (
    adjoint_residual,
    decoupled_decay,
    full_oracles,
    probe_estimator,
)
from bilevel_flax.diagnostics.symmetry import SymmetryCheck, check_symmetry

__all__ = [
    "HypergradientCheck",
    "Influence",
    "SymmetryCheck",
    "adjoint_residual",
    "check_means",
    "check_symmetry",
    "decoupled_decay",
    "full_oracles",
    "hypergradient_check",
    "influence",
    "probe_estimator",
]
