"""How good is the hypergradient: full directions, the adjoint's residual, a reference."""

from bilevel_flax.diagnostics.hypergradient import HypergradientCheck, hypergradient_check
from bilevel_flax.diagnostics.residual import (
    adjoint_residual,
    decoupled_decay,
    full_oracles,
    probe_estimator,
)

__all__ = [
    "HypergradientCheck",
    "adjoint_residual",
    "decoupled_decay",
    "full_oracles",
    "hypergradient_check",
    "probe_estimator",
]
