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

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Variables
from bilevel_flax.minibatches import repeat_real
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.derivatives import PRODUCTS, check_adjoint
from bilevel_flax.oracles.evaluate import NOTHING, Evaluation
from bilevel_flax.oracles.linear_models import LinearLoss, linear_loss
from bilevel_flax.tree import Split, depends_on, split


class Codes(NamedTuple):
    """An evaluation as `decode(residuals) + exact`.

    Attributes:
        residuals: what a minibatch is memorised by; a leaf of x that its losses do not use is None.
        exact: what is the same for every minibatch (None: nothing).
        decode: linear, from (any fields of) the residuals to the oracles without `exact`.
    """

    residuals: Oracles
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
    """`evaluate_all` of a `linear_problem`, with its `codes` beside the oracles.

    Where a minibatch's losses are scaled (`importance_weighted`), the penalties are not.
    Microbatches are not needed: a linear model's activations are the logits, and those of the whole
    minibatch are what is asked for.

    Args:
        problem: made by `linear_problem`.
        variables: the point (z, v, x).
        batch: as in `evaluate`.
        model_state: handed on; there is none.
        rngs: not used.
    """
    del rngs
    batch = batch._replace(inner=repeat_real(batch.inner), outer=repeat_real(batch.outer))
    inner_model, outer_model = _model(problem, "inner_loss"), _model(problem, "outer_loss")
    z, v, x = variables
    check_adjoint(z, v)
    products = PRODUCTS[problem.derivatives]
    at, along = split(z), split(v).leaves
    residuals, exact = NOTHING, NOTHING
    inner_loss = outer_loss = pull_inner = pull_outer = None
    if batch.inner is not None:
        logits, moved, pull_inner = _push(inner_model, at, along, batch.inner)
        x_rows = split(rows.gather(problem.per_sample, x, batch.inner))

        def inner_data(logits, leaves):
            return inner_model.data(logits[0], x_rows.merge(leaves), batch.inner), None

        _, (residual,), ((curved,), cross) = products(inner_data, logits, x_rows.leaves, moved)
        cross = _where(depends_on(inner_data, logits, x_rows.leaves)[1:], cross)
        cross = rows.wrap(problem.per_sample, x_rows.complete(cross), x, batch.inner)
        residuals = residuals._replace(inner_grad=residual, hvp=curved, cross_jvp=cross)
        whole_loss, *_ = losses.inner(problem, z, x, batch.inner, None, None)
        inner_loss, _ = whole_loss(at.leaves, x_rows.leaves)
        if inner_model.penalty is not None:
            penalty, shared = _penalty(problem, inner_model.penalty, "inner_penalty", at, x)
            _, grad, (curved, cross) = products(penalty, at.leaves, shared.leaves, along)
            parts = at.complete(grad), at.complete(curved), shared.complete(cross)
            exact = exact._replace(inner_grad=parts[0], hvp=parts[1], cross_jvp=parts[2])
    if batch.outer is not None:
        logits, _, pull_outer = _push(outer_model, at, along, batch.outer)
        shared, restore = losses.without_rows(problem, x)

        def outer_data(logits, leaves):
            x = restore(shared.merge(leaves))
            return outer_model.data(logits[0], x, batch.outer), None

        grads, _ = jax.grad(outer_data, (0, 1), has_aux=True)(logits, shared.leaves)
        (residual,), direct = grads
        direct = shared.complete(_where(depends_on(outer_data, logits, shared.leaves)[1:], direct))
        residuals = residuals._replace(outer_grad_inner=residual, outer_grad_outer=direct)
        whole_loss, *_ = losses.outer(problem, z, x, batch.outer, None, None)
        outer_loss, _ = whole_loss(at.leaves, shared.leaves)
        if outer_model.penalty is not None:
            penalty, shared = _penalty(problem, outer_model.penalty, "outer_penalty", at, x)
            grads, _ = jax.grad(penalty, (0, 1), has_aux=True)(at.leaves, shared.leaves)
            parts = at.complete(grads[0]), shared.complete(grads[1])
            exact = exact._replace(outer_grad_inner=parts[0], outer_grad_outer=parts[1])

    def decode(residuals: Oracles) -> Oracles:
        back = lambda pull, code: None if code is None else at.complete(pull(code))
        return residuals._replace(
            inner_grad=back(pull_inner, residuals.inner_grad),
            hvp=back(pull_inner, residuals.hvp),
            outer_grad_inner=back(pull_outer, residuals.outer_grad_inner),
        )

    oracles = plus(decode(residuals), exact)
    codes = Codes(residuals, exact, decode)
    return Evaluation(oracles, inner_loss, outer_loss, model_state, {}, codes=codes)


def check_linear(problem: Problem, z: PyTree, batch: PyTree) -> None:
    """Raises unless the logits are linear (or affine) in z.

    Raises:
        ValueError: their derivative depends on z.
    """
    at = split(z)

    def moved(leaves, along):
        model = _model(problem, "inner_loss")
        return _push(model, at._replace(leaves=leaves), along, batch)[1]

    if any(depends_on(moved, at.leaves, at.leaves)[: len(at.leaves)]):
        raise ValueError(
            "logits is not linear in inner_params (its derivative depends on them), so residuals "
            'do not tell its gradients: use memory="full"'
        )


def _model(problem: Problem, side: str) -> LinearLoss:
    model = linear_loss(getattr(problem, side))
    assert model is not None  # `saba` has checked it
    return model


def _push(model: LinearLoss, at: Split, along: list, batch: PyTree):
    """`([A z], [A v], code -> Aᵀ code)`, lists of one leaf as `PRODUCTS` wants them."""

    def of(leaves):
        return [model.logits(at.merge(leaves), batch)]

    value, moved = jax.jvp(of, (at.leaves,), (along,))
    _, transpose = jax.vjp(of, at.leaves)

    def pull(code):
        return transpose([code.astype(value[0].dtype)])[0]

    return value, moved, pull


def _penalty(problem: Problem, function: Callable, name: str, at: Split, x: PyTree):
    shared, restore = losses.without_rows(problem, x)
    losses.refuse_rows(problem, lambda x: function(at.merge(at.leaves), x), x, name)

    def penalty(z_leaves, x_leaves):
        return function(at.merge(z_leaves), restore(shared.merge(x_leaves))), None

    return penalty, shared


def _where(used: list[bool], leaves: list) -> list:
    return [leaf if flag else None for flag, leaf in zip(used, leaves, strict=True)]
