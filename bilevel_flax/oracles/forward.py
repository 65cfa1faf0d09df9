"""∇₁G and ∇²₂₁G v without Hv: what x needs in a step in which v stands still.

∇²₂₁G v is the gradient in x of one number, the slope of G at z in the direction v. Forward mode
gives the slope for two products a layer, on top of the forward pass that ∇₁G takes anyway, and
backprop to x goes only as deep as x enters: for weights of examples, not into the network at all.
"""

from __future__ import annotations

import jax

from bilevel_flax.base import Batch, Oracles, Problem, Variables
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.derivatives import outer_grads
from bilevel_flax.oracles.evaluate import Evaluation
from bilevel_flax.oracles.microbatches import accumulated
from bilevel_flax.oracles.products import check_adjoint
from bilevel_flax.tree import split

# Of `inner_grad_and_cross` where x enters after the network: a gradient and a forward tangent.
FORWARD_UNITS = 5 / 3


def inner_grad_and_cross(problem: Problem, variables: Variables, batch, model_state=None, rng=None):
    """∇₁G and ∇²₂₁G v (5/3 units where x enters after the network, as weights of examples do).

    Args:
        problem: the problem, with forward-mode derivatives.
        variables: the point (z, v, x).
        batch: an inner minibatch.
        model_state: mutable state, handed to a stateful loss.
        rng: its key; one draw serves both.

    Returns:
        `((loss, aux), inner_grad, cross_jvp)`.

    Raises:
        ValueError: `problem.derivatives` is another mode.
    """
    if problem.derivatives != "forward_over_reverse":
        raise ValueError(
            f"derivatives={problem.derivatives!r}: D_x without Hv needs forward mode; leave out "
            "adjoint_every"
        )
    z, v, x = variables
    check_adjoint(z, v)

    def on(batch, model_state, rng):
        loss, z_split, x_split, as_outer = losses.inner(problem, z, x, batch, model_state, rng)
        direction = split(v).leaves

        def slope(x_leaves):
            def value_at(z_leaves):
                return loss(z_leaves, x_leaves)[0]

            return jax.jvp(value_at, (z_split.leaves,), (direction,))[1]

        # Two forward passes in the program, one after XLA's common-subexpression elimination.
        out, grad_z = jax.value_and_grad(loss, has_aux=True)(z_split.leaves, x_split.leaves)
        cross = jax.grad(slope)(x_split.leaves)
        return out, z_split.complete(grad_z), as_outer(cross)

    return accumulated(problem, on, batch, model_state, rng)


def evaluate_forward(
    problem: Problem, variables: Variables, batch: Batch, model_state=None, rngs=(None, None)
) -> Evaluation:
    """∇₁G, ∇²₂₁G v and ∇₂F; Hv and ∇₁F are left out.

    F is not evaluated where x has only per-sample leaves or F does not use it; an
    `outer_updates_state` is skipped.

    Raises:
        ValueError: as `inner_grad_and_cross`.
    """
    z, _, x = variables
    (loss, aux), grad, cross = inner_grad_and_cross(
        problem, variables, batch.inner, model_state, rngs[0]
    )
    _, outer_grad = outer_grads(problem, z, x, batch.outer, model_state, rngs[1])
    metrics = {f"inner_{k}": v for k, v in aux.metrics.items()}
    found = Oracles(grad, None, cross, None, outer_grad)
    return Evaluation(found, loss, None, aux.model_state, metrics)
