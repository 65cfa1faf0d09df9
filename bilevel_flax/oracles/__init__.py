"""The five quantities every method is made of; the only place with derivative code.

`∇₁G`, `∇²₁₁G v` and `∇²₂₁G v` come out of one differentiated backprop of the inner loss,

    grads = lambda z: jax.grad(G, argnums=(0, 1))(z, x)
    (∇₁G, _), (∇²₁₁G v, ∇²₂₁G v) = jax.jvp(grads, (z,), (v,))

and `∇₁F`, `∇₂F` out of one backprop of the outer one: 4 gradient units in all, counted as
gradient = HVP = cross-JVP = 1. `Problem.derivatives` chooses how the products are made:

* forward_over_reverse: as above. Exact.
* reverse_over_reverse: backprop of <∇₁G, v>. Exact; for losses that forward mode cannot
  differentiate (some `custom_vjp`); more memory.
* finite_differences: (∇G(z + εv) - ∇G(z - εv)) / 2ε with ε = ∛eps · max(1, ‖z‖) / ‖v‖, eps the
  machine precision. Relative error about eps^(2/3) on smooth losses of moderate curvature: 3e-5
  in float32 and 3e-11 in float64, measured in `tests/oracles_test.py`; unbounded at kinks.

`evaluate` gives all five; the pieces (`inner_grad`, `hvp`, ...) are exported too, so that no method
pays for a quantity that it does not use. `FORWARD_UNITS` is what `inner_grad_and_cross` costs where
x enters after the network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bilevel_flax.base import Oracles
from bilevel_flax.oracles.derivatives import (
    FORWARD_UNITS,
    cross_jvp,
    hvp,
    inner_grad_and_cross,
    inner_products,
)
from bilevel_flax.oracles.evaluate import (
    Evaluation,
    evaluate,
    evaluate_all,
    evaluate_inner,
    evaluate_without_hvp,
    residual,
)
from bilevel_flax.oracles.gradients import (
    inner_grad,
    inner_grad_outer,
    inner_value_and_grad,
    inner_value_and_grads,
    outer_grads,
    outer_value_and_grads,
    unrolled_value_and_grad,
)
from bilevel_flax.oracles.linear_models import linear_problem
from bilevel_flax.oracles.mixed_mode import differentiable_inner_grad
from bilevel_flax.oracles.mixed_precision import mixed_precision
from bilevel_flax.oracles.oracle import Oracle, Shared, bind, directions
from bilevel_flax.oracles.penalty import evaluate_by_penalty
from bilevel_flax.oracles.subsample import evaluate_subsample
from bilevel_flax.oracles.trainable import trainable
from bilevel_flax.oracles.weighted_sums import weighted_sums
from bilevel_flax.oracles.wrapped_loss import wrap_losses
from bilevel_flax.oracles.wrappers import configured, microbatched, remat

if TYPE_CHECKING:
    from bilevel_flax.oracles.attention import (
        chunked_attention,
        dot_product_attention,
        pallas_attention,
    )
    from bilevel_flax.oracles.derivative_modes import Probe, probe
    from bilevel_flax.oracles.fitted_memory import Fit, fit_memory
    from bilevel_flax.oracles.kernels import WithReference, with_reference
    from bilevel_flax.oracles.rematerialisation import keep

__all__ = [
    "FORWARD_UNITS",
    "Evaluation",
    "Fit",
    "Oracle",
    "Oracles",
    "Probe",
    "Shared",
    "WithReference",
    "bind",
    "chunked_attention",
    "configured",
    "cross_jvp",
    "differentiable_inner_grad",
    "directions",
    "dot_product_attention",
    "evaluate",
    "evaluate_all",
    "evaluate_by_penalty",
    "evaluate_inner",
    "evaluate_subsample",
    "evaluate_without_hvp",
    "fit_memory",
    "hvp",
    "inner_grad",
    "inner_grad_and_cross",
    "inner_grad_outer",
    "inner_products",
    "inner_value_and_grad",
    "inner_value_and_grads",
    "keep",
    "linear_problem",
    "microbatched",
    "mixed_precision",
    "outer_grads",
    "outer_value_and_grads",
    "pallas_attention",
    "probe",
    "remat",
    "residual",
    "trainable",
    "unrolled_value_and_grad",
    "weighted_sums",
    "with_reference",
    "wrap_losses",
]


# Where to find what is imported when it is first asked for: few losses need it.
_LATER = {
    "Fit": "fitted_memory",
    "Probe": "derivative_modes",
    "WithReference": "kernels",
    "chunked_attention": "attention",
    "dot_product_attention": "attention",
    "fit_memory": "fitted_memory",
    "keep": "rematerialisation",
    "pallas_attention": "attention",
    "probe": "derivative_modes",
    "with_reference": "kernels",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
