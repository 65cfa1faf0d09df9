"""The oracles of a `linear_problem`, taken apart into what varies between minibatches and how much.

With logits = A z the derivatives in z are Aᵀ applied to those in logit space,

    ∇₁G = Aᵀ r + ∇₁p      ∇²₁₁G v = Aᵀ ṙ + ∇²₁₁p v      r = dG/dlogits, ṙ its derivative along A v

and A belongs to the minibatch's features, which do not change: r and ṙ, [batch, classes], tell all
of a minibatch's gradient and Hessian product. The penalty p is no matter of minibatches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Variables
from bilevel_flax.minibatches import repeat_real
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.evaluate import Evaluation
from bilevel_flax.oracles.products import PRODUCTS, check_adjoint
from bilevel_flax.tree import Split, split, uses

NOTHING = Oracles(None, None, None, None, None)


class Components(NamedTuple):
    """An evaluation as `decode(codes) + exact`.

    Attributes:
        codes: what a minibatch is memorised by; a leaf of x that its losses do not use is None.
        exact: what is the same for every minibatch (None: nothing).
        decode: linear, from (any fields of) the codes to the oracles without `exact`.
    """

    codes: Oracles
    exact: Oracles
    decode: Callable[[Oracles], Oracles]


def plus(oracles: Oracles, exact: Oracles) -> Oracles:
    """Their sum, in the dtypes of the first; None stands for nothing."""

    def leaf(a, b):
        if a is None or b is None:
            return b if a is None else a
        return a + b.astype(a.dtype)

    def total(a, b):
        if a is None or b is None:
            return b if a is None else a
        return jax.tree.map(leaf, a, b, is_leaf=lambda node: node is None or rows.is_rows(node))

    return Oracles(*(total(a, b) for a, b in zip(oracles, exact, strict=True)))


def evaluate_linear(
    problem: Problem,
    variables: Variables,
    batch: Batch,
    model_state: PyTree = None,
    rngs: Any = None,
) -> Evaluation:
    """`evaluate_all` of a `linear_problem`, with its `components` beside the oracles.

    Where a minibatch's losses are scaled (`LinearModel.inner_data`), the penalties are not.
    `Problem.microbatches` is not needed: a linear model's activations are the logits, and those
    of the whole minibatch are what is asked for.

    Args:
        problem: made by `linear_problem`.
        variables: the point (z, v, x).
        batch: as in `evaluate`.
        model_state: handed on; there is none.
        rngs: not used.
    """
    del rngs
    batch = batch._replace(inner=repeat_real(batch.inner), outer=repeat_real(batch.outer))
    model = problem.linear
    z, v, x = variables
    check_adjoint(z, v)
    products = PRODUCTS[problem.derivatives]
    at, along = split(z), split(v).leaves
    codes, exact = NOTHING, NOTHING
    inner_loss = outer_loss = pull_inner = pull_outer = None
    if batch.inner is not None:
        logits, moved, pull_inner = _push(problem, at, along, batch.inner)
        seen = split(rows.gather(problem.per_sample, x, batch.inner))

        def inner_data(logits, leaves):
            return model.inner_data(*logits, seen.merge(leaves), batch.inner), None

        _, (residual,), ((curved,), cross) = products(inner_data, logits, seen.leaves, moved)
        cross = _where(uses(inner_data, logits, seen.leaves)[1:], cross)
        cross = rows.wrap(problem.per_sample, seen.complete(cross), x, batch.inner)
        codes = codes._replace(inner_grad=residual, hvp=curved, cross_jvp=cross)
        whole_loss, *_ = losses.inner(problem, z, x, batch.inner, None, None)
        inner_loss, _ = whole_loss(at.leaves, seen.leaves)
        if model.inner_penalty is not None:
            penalty, shown = _penalty(problem, model.inner_penalty, "inner_penalty", at, x)
            _, grad, (curved, cross) = products(penalty, at.leaves, shown.leaves, along)
            parts = at.complete(grad), at.complete(curved), shown.complete(cross)
            exact = exact._replace(inner_grad=parts[0], hvp=parts[1], cross_jvp=parts[2])
    if batch.outer is not None:
        logits, _, pull_outer = _push(problem, at, along, batch.outer)
        shown, restore = losses.visible(problem, x, "outer_losses")

        def outer_data(logits, leaves):
            seen = restore(shown.merge(leaves))
            return model.outer_data(*logits, seen, batch.outer), None

        grads, _ = jax.grad(outer_data, (0, 1), has_aux=True)(logits, shown.leaves)
        (residual,), direct = grads
        direct = shown.complete(_where(uses(outer_data, logits, shown.leaves)[1:], direct))
        codes = codes._replace(outer_grad_inner=residual, outer_grad_outer=direct)
        whole_loss, *_ = losses.outer(problem, z, x, batch.outer, None, None)
        outer_loss, _ = whole_loss(at.leaves, shown.leaves)
        if model.outer_penalty is not None:
            penalty, shown = _penalty(problem, model.outer_penalty, "outer_penalty", at, x)
            grads, _ = jax.grad(penalty, (0, 1), has_aux=True)(at.leaves, shown.leaves)
            parts = at.complete(grads[0]), shown.complete(grads[1])
            exact = exact._replace(outer_grad_inner=parts[0], outer_grad_outer=parts[1])

    def decode(codes: Oracles) -> Oracles:
        back = lambda pull, code: None if code is None else at.complete(pull(code))
        return codes._replace(
            inner_grad=back(pull_inner, codes.inner_grad),
            hvp=back(pull_inner, codes.hvp),
            outer_grad_inner=back(pull_outer, codes.outer_grad_inner),
        )

    whole = plus(decode(codes), exact)
    found = Components(codes, exact, decode)
    return Evaluation(whole, inner_loss, outer_loss, model_state, {}, components=found)


def check_linear(problem: Problem, z: PyTree, batch: PyTree) -> None:
    """Raises unless the logits are linear (or affine) in z.

    Raises:
        ValueError: their derivative depends on z.
    """
    at = split(z)

    def moved(leaves, along):
        return _push(problem, at._replace(leaves=leaves), along, batch)[1]

    if any(uses(moved, at.leaves, at.leaves)[: len(at.leaves)]):
        raise ValueError(
            "logits is not linear in inner_params (its derivative depends on them), so residuals "
            'do not tell its gradients: use memory="full"'
        )


def _push(problem: Problem, at: Split, along: list, batch: PyTree):
    """`([A z], [A v], code -> Aᵀ code)`, lists of one leaf as `PRODUCTS` wants them."""
    seen = losses.lowered(problem, batch)

    def of(leaves):
        logits = problem.linear.logits(losses.lowered(problem, at.merge(leaves)), seen)
        if problem.compute_dtype is not None:
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return [logits]

    value, moved = jax.jvp(of, (at.leaves,), (along,))
    _, transpose = jax.vjp(of, at.leaves)

    def pull(code):
        return transpose([code.astype(value[0].dtype)])[0]

    return value, moved, pull


def _penalty(problem: Problem, function: Callable, name: str, at: Split, x: PyTree):
    shown, restore = losses.visible(problem, x, name)

    def penalty(z_leaves, x_leaves):
        return function(at.merge(z_leaves), restore(shown.merge(x_leaves))), None

    return penalty, shown


def _where(used: list[bool], leaves: list) -> list:
    return [leaf if flag else None for flag, leaf in zip(used, leaves, strict=True)]
