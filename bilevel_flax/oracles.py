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

The pieces (`inner_grad`, `hvp`, ...) are exported too, so that no method pays for a quantity that
it does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import rows
from bilevel_flax.base import Aux, Batch, Metrics, Oracles, Problem, PyTree, Variables


class Evaluation(NamedTuple):
    """The oracles on one minibatch and what else the same forward passes gave.

    Attributes:
        oracles: the five quantities; those of a side whose batch is None are None.
        inner_loss: G on the minibatch, or None.
        outer_loss: F on the minibatch, or None.
        model_state: the mutable state after the step (stateful problems).
        metrics: the user's scalars, `inner_` and `outer_` before their names.
        residual: the adjoint's relative residual; None: that of `oracles`.
    """

    oracles: Oracles
    inner_loss: Any
    outer_loss: Any
    model_state: PyTree
    metrics: Metrics
    residual: Any = None


class _Split(NamedTuple):
    """A tree's differentiable leaves, and the way back."""

    leaves: list[jax.Array]
    merge: Callable[[list[jax.Array]], PyTree]  # the other leaves as they were
    complete: Callable[[list[jax.Array]], PyTree]  # the other leaves as zeros


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is differentiated: floats are, integers and PRNG keys are not."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _split(tree: PyTree) -> _Split:
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def rebuild(new, others):
        out = list(others)
        for i, leaf in zip(chosen, new, strict=True):
            out[i] = leaf
        return treedef.unflatten(out)

    def complete(new):
        return rebuild(new, [None if is_inexact(x) else jnp.zeros_like(x) for x in leaves])

    return _Split([leaves[i] for i in chosen], lambda new: rebuild(new, leaves), complete)


class _NotInOuterLoss:
    """Stands in the outer loss for a per-sample leaf; any use of it raises."""

    def __init__(self, shape):
        self._described = f"outer_loss uses a per-sample leaf of outer_params (shape {shape})"

    def _refuse(self, *args, **kwargs):
        raise ValueError(
            f"{self._described}, but only the inner loss is handed its rows: move the term to "
            "inner_loss, or leave the leaf out of Problem(per_sample=...)"
        )

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__array__", "__jax_array__"):
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __len__ = __iter__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = __abs__ = __float__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = object.__hash__


def _call(loss: Callable, name: str, stateful: bool, args: tuple, context: tuple):
    """Runs a user's loss; checks what it returns at trace time."""
    out = loss(*args, *context) if stateful else loss(*args)
    if stateful:
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Aux)):
            raise TypeError(
                f"{name} of a stateful Problem must return (loss, bilevel_flax.Aux(model_state, "
                f"metrics)), got {type(out).__name__}"
            )
        value, aux = out
    else:
        if isinstance(out, tuple):
            raise TypeError(
                f"{name} returned a tuple; a loss returns a scalar, or (loss, Aux) with "
                "Problem(stateful=True)"
            )
        value, aux = out, Aux()
    if jnp.shape(value) != () or not is_inexact(value):
        raise TypeError(
            f"{name} must return a real scalar, got shape {jnp.shape(value)} "
            f"dtype {jnp.result_type(value)}: take the mean over the minibatch"
        )
    return value, aux


def _inner(problem: Problem, z, x, batch, model_state, rng):
    """G as a function of the differentiable leaves of z and of x's rows -> (loss, aux)."""
    z_split = _split(z)
    x_split = _split(rows.gather(problem.per_sample, x, batch))

    def loss(z_leaves, x_leaves):
        args = (z_split.merge(z_leaves), x_split.merge(x_leaves), batch)
        return _call(problem.inner_loss, "inner_loss", problem.stateful, args, (model_state, rng))

    if problem.remat:
        loss = jax.checkpoint(loss)

    def as_outer(leaves):
        return rows.wrap(problem.per_sample, x_split.complete(leaves), x, batch)

    return loss, z_split, x_split, as_outer


def _check_adjoint(z: PyTree, v: PyTree) -> None:
    if jax.tree.structure(z) != jax.tree.structure(v):
        raise ValueError(
            "the adjoint's tree differs from inner_params': "
            f"{jax.tree.structure(v)} against {jax.tree.structure(z)}; "
            "start from `solver.init`, or jax.tree.map(jnp.zeros_like, inner_params)"
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(z), jax.tree.leaves(v), strict=True):
        if jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
            raise ValueError(
                f"the adjoint's leaf {jax.tree_util.keystr(path)} is "
                f"{jnp.result_type(b)}{jnp.shape(b)}, inner_params' is "
                f"{jnp.result_type(a)}{jnp.shape(a)}: v has z's shapes and dtypes exactly"
            )


def _forward_over_reverse(loss, z, x, v):
    def grads(z):
        (value, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(z, x)
        return grads, (value, aux)

    try:
        (grad_z, _), products, (value, aux) = jax.jvp(grads, (z,), (v,), has_aux=True)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "inner_loss uses a custom_vjp function that forward mode cannot differentiate: "
            'set Problem(..., derivatives="reverse_over_reverse")'
        ) from error
    return (value, aux), grad_z, products


def _reverse_over_reverse(loss, z, x, v):
    def product(z, x):
        (value, aux), grad_z = jax.value_and_grad(loss, has_aux=True)(z, x)
        return optax.tree.vdot(grad_z, v), (grad_z, value, aux)

    products, (grad_z, value, aux) = jax.grad(product, argnums=(0, 1), has_aux=True)(z, x)
    return (value, aux), grad_z, products


def _finite_differences(loss, z, x, v):
    grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), (grad_z, _) = grads(z, x)
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in z), default=1.0)
    norm = optax.tree.norm(v)
    step = eps ** (1 / 3) * jnp.maximum(1.0, optax.tree.norm(z)) / jnp.where(norm > 0, norm, 1.0)

    def at(sign):
        moved = [a + (sign * step).astype(a.dtype) * b for a, b in zip(z, v, strict=True)]
        return grads(moved, x)[1]

    products = jax.tree.map(
        lambda plus, minus: (plus - minus) / (2 * step).astype(plus.dtype), at(1.0), at(-1.0)
    )
    return (value, aux), grad_z, products


_PRODUCTS = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "finite_differences": _finite_differences,
}


def inner_products(problem: Problem, variables: Variables, batch, model_state=None, rng=None):
    """∇₁G, ∇²₁₁G v and ∇²₂₁G v from one differentiated backprop (3 units).

    Args:
        problem: the problem.
        variables: the point (z, v, x).
        batch: an inner minibatch.
        model_state: mutable state, handed to a stateful loss.
        rng: its key; one draw serves the primal and the tangent.

    Returns:
        `((loss, aux), inner_grad, hvp, cross_jvp)`.
    """
    z, v, x = variables
    _check_adjoint(z, v)
    loss, z_split, x_split, as_outer = _inner(problem, z, x, batch, model_state, rng)
    out, grad_z, (hvp, cross) = _PRODUCTS[problem.derivatives](
        loss, z_split.leaves, x_split.leaves, _split(v).leaves
    )
    return out, z_split.complete(grad_z), z_split.complete(hvp), as_outer(cross)


def inner_value_and_grad(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁G)` (1 unit)."""
    loss, z_split, x_split, _ = _inner(problem, z, x, batch, model_state, rng)
    out, grad = jax.value_and_grad(loss, has_aux=True)(z_split.leaves, x_split.leaves)
    return out, z_split.complete(grad)


def inner_grad(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₁G (1 unit)."""
    return inner_value_and_grad(problem, z, x, batch, model_state, rng)[1]


def inner_grad_outer(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₂G, the inner loss's direct gradient in x (1 unit); per-sample leaves are `Rows`."""
    loss, z_split, x_split, as_outer = _inner(problem, z, x, batch, model_state, rng)
    grad, _ = jax.grad(loss, argnums=1, has_aux=True)(z_split.leaves, x_split.leaves)
    return as_outer(grad)


def hvp(problem: Problem, variables: Variables, batch, model_state=None, rng=None) -> PyTree:
    """∇²₁₁G v (1 unit by the papers' count)."""
    return inner_products(problem, variables, batch, model_state, rng)[2]


def cross_jvp(problem: Problem, variables: Variables, batch, model_state=None, rng=None) -> PyTree:
    """∇²₂₁G v (1 unit by the papers' count); per-sample leaves are `Rows`."""
    return inner_products(problem, variables, batch, model_state, rng)[3]


def _outer(problem: Problem, z, x, batch, model_state, rng):
    """F as a function of the differentiable leaves of z and of x's visible ones -> (loss, aux)."""
    z_split = _split(z)
    visible = rows.map_prefix(problem.per_sample, lambda _: None, lambda leaf: leaf, x)
    x_split = _split(visible)
    hidden = rows.map_prefix(
        problem.per_sample, lambda leaf: _NotInOuterLoss(jnp.shape(leaf)), lambda _: None, x
    )

    def restore(visible):
        return jax.tree.map(
            lambda seen, stand_in: stand_in if seen is None else seen,
            visible,
            hidden,
            is_leaf=lambda node: node is None,
        )

    def loss(z_leaves, x_leaves):
        args = (z_split.merge(z_leaves), restore(x_split.merge(x_leaves)), batch)
        return _call(problem.outer_loss, "outer_loss", problem.stateful, args, (model_state, rng))

    return loss, z_split, x_split


def outer_value_and_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁F, ∇₂F)` from one backprop (1 unit); per-sample leaves of ∇₂F are None."""
    loss, z_split, x_split = _outer(problem, z, x, batch, model_state, rng)
    out, (grad_z, grad_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        z_split.leaves, x_split.leaves
    )
    return out, z_split.complete(grad_z), x_split.complete(grad_x)


def outer_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`(∇₁F, ∇₂F)` from one backprop (1 unit)."""
    return outer_value_and_grads(problem, z, x, batch, model_state, rng)[1:]


def unrolled_value_and_grad(problem: Problem, unroll: Callable, x, batch, rng=None):
    """d/dx F(z_K(x), x) by backprop through an inner loop, the loop's start held fixed.

    Args:
        problem: the problem.
        unroll: `unroll(x) -> (z_K, model_state, extra)`, differentiable in x's float leaves, with
            the mutable state that a stateful outer loss is to be handed.
        x: the outer parameters.
        batch: an outer minibatch.
        rng: key of a stateful outer loss.

    Returns:
        `((loss, aux), gradient, (z_K, extra))`; the gradient is dense, in x's tree. K inner
        gradients, K HVPs, K cross-JVPs and one gradient of F: 3K + 1 units.
    """
    split = _split(x)

    def total(leaves):
        now = split.merge(leaves)
        z, model_state, extra = unroll(now)
        loss, z_split, x_split = _outer(problem, z, now, batch, model_state, rng)
        value, aux = loss(z_split.leaves, x_split.leaves)
        return value, (aux, (z, extra))

    (value, (aux, found)), grad = jax.value_and_grad(total, has_aux=True)(split.leaves)
    return (value, aux), split.complete(grad), found


def evaluate_all(
    problem: Problem, variables: Variables, batch: Batch, model_state=None, rngs=(None, None)
) -> Evaluation:
    """The oracles with losses, state and metrics; `rngs` are the keys of (G, F)."""
    z, _, x = variables
    inner_loss = outer_loss = grad = product = cross = outer_inner = outer_outer = None
    inner_aux = outer_aux = Aux(model_state)
    inner_rng, outer_rng = rngs
    if batch.inner is not None:
        (inner_loss, inner_aux), grad, product, cross = inner_products(
            problem, variables, batch.inner, model_state, inner_rng
        )
    if batch.outer is not None:
        seen = inner_aux.model_state if problem.outer_updates_state else model_state
        (outer_loss, outer_aux), outer_inner, outer_outer = outer_value_and_grads(
            problem, z, x, batch.outer, seen, outer_rng
        )
    chosen = outer_aux if problem.outer_updates_state else inner_aux
    metrics = {f"inner_{k}": v for k, v in inner_aux.metrics.items()}
    metrics |= {f"outer_{k}": v for k, v in outer_aux.metrics.items()}
    oracles = Oracles(grad, product, cross, outer_inner, outer_outer)
    return Evaluation(oracles, inner_loss, outer_loss, chosen.model_state, metrics)


def evaluate(problem: Problem, variables: Variables, batch: Batch, model_state=None, rng=None):
    """The five quantities at one point on one pair of minibatches: 4 gradient units.

    Args:
        problem: the problem.
        variables: the point (z, v, x); v has z's tree, shapes and dtypes.
        batch: `batch.inner` for G, `batch.outer` for F; either may be None, then its quantities
            are None.
        model_state: mutable state of a stateful problem.
        rng: key of a stateful problem; split once between G and F.

    Returns:
        `Oracles`; for stateful problems `(Oracles, Aux(new_model_state, metrics))`.

    Raises:
        TypeError: a loss does not return a real scalar, or forward mode cannot differentiate it.
        ValueError: inner and adjoint trees differ; `batch["index"]` is missing.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x * batch) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: (z * batch).sum(),
        ... )
        >>> point = bf.Variables(jnp.zeros(2), jnp.ones(2), jnp.array(3.0))
        >>> oracles = bf.oracles.evaluate(problem, point, bf.Batch(jnp.ones(2), jnp.ones(2)))
        >>> oracles.hvp.tolist(), float(oracles.cross_jvp)
        ([1.0, 1.0], -2.0)
    """
    rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
    found = evaluate_all(problem, variables, batch, model_state, rngs)
    if problem.stateful:
        return found.oracles, Aux(found.model_state, found.metrics)
    return found.oracles


def _block(batch: PyTree, block: jax.Array, parts: int) -> tuple[PyTree, Any]:
    """Block number `block` of `parts` equal ones, and what makes its masked mean unbiased."""

    def cut(leaf):
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"a leaf of the minibatch has shape {leaf.shape}: fraction=1/{parts} needs a "
                f"leading length that {parts} divides"
            )
        size = leaf.shape[0] // parts
        return jax.lax.dynamic_slice_in_dim(leaf, block * size, size)

    chosen = jax.tree.map(cut, batch)
    if not (isinstance(batch, dict) and "mask" in batch):
        return chosen, None
    real = jnp.maximum(jnp.sum(batch["mask"]), 1)
    return chosen, jnp.sum(chosen["mask"]) * parts / real


def _times(tree: PyTree, factor: Any) -> PyTree:
    if factor is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf * factor.astype(leaf.dtype) if is_inexact(leaf) else leaf, tree
    )


def evaluate_block(
    problem: Problem,
    variables: Variables,
    batch: Batch,
    model_state=None,
    rngs=(None, None),
    *,
    block: jax.Array,
    parts: int,
) -> Evaluation:
    """`evaluate_all` with ∇₁G on the whole minibatch and the rest on one of its `parts` blocks.

    Averaged over the blocks it is `evaluate_all` (for losses without BatchNorm), at 1 + 3/parts
    gradient units. The model state and the inner loss are those of the whole minibatch.

    Args:
        problem: the problem.
        variables: the point (z, v, x).
        batch: both sides; leaves [batch, ...] with `parts` dividing batch.
        model_state: mutable state of a stateful problem.
        rngs: the keys of (G, F).
        block: int32 scalar in [0, parts).
        parts: number of blocks.

    Raises:
        ValueError: `parts` does not divide a leading length.
    """
    z, _, x = variables
    (inner_loss, inner_aux), grad = inner_value_and_grad(
        problem, z, x, batch.inner, model_state, rngs[0]
    )
    inner_part, inner_share = _block(batch.inner, block, parts)
    outer_part, outer_share = _block(batch.outer, block, parts)
    _, _, product, cross = inner_products(problem, variables, inner_part, model_state, rngs[0])
    seen = inner_aux.model_state if problem.outer_updates_state else model_state
    (outer_loss, outer_aux), outer_inner, outer_outer = outer_value_and_grads(
        problem, z, x, outer_part, seen, rngs[1]
    )
    product, cross = _times((product, cross), inner_share)
    outer_inner, outer_outer = _times((outer_inner, outer_outer), outer_share)
    chosen = outer_aux if problem.outer_updates_state else inner_aux
    metrics = {f"inner_{k}": v for k, v in inner_aux.metrics.items()}
    metrics |= {f"outer_{k}": v for k, v in outer_aux.metrics.items()}
    found = Oracles(grad, product, cross, outer_inner, outer_outer)
    return Evaluation(found, inner_loss, outer_loss, chosen.model_state, metrics)


def evaluate_inner(
    problem: Problem, variables: Variables, batch: Batch, model_state, rngs, like: Evaluation
) -> Evaluation:
    """∇₁G alone (1 unit), in the shape of the evaluation `like`: zeros for all that is left out.

    F's loss and metrics, which are not evaluated, are NaN; an `outer_updates_state` is skipped.
    """
    (loss, aux), grad = inner_value_and_grad(
        problem, variables.inner, variables.outer, batch.inner, model_state, rngs[0]
    )

    def nothing(node):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), node)
        if rows.is_rows(node):
            return zeros._replace(index=jnp.full_like(zeros.index, jnp.iinfo(jnp.int32).max))
        return zeros

    empty = jax.tree.map(nothing, like.oracles, is_leaf=rows.is_rows)
    metrics = {k: jnp.full(v.shape, jnp.nan, v.dtype) for k, v in like.metrics.items()}
    metrics |= {f"inner_{k}": v for k, v in aux.metrics.items()}
    return Evaluation(
        empty._replace(inner_grad=grad),
        loss,
        jnp.full(like.outer_loss.shape, jnp.nan, like.outer_loss.dtype),
        aux.model_state,
        metrics,
    )


def directional(function: Callable, primals: tuple, tangents: tuple) -> PyTree:
    """The derivative of any function of pytrees in one direction, over the float leaves.

    Args:
        function: `function(*primals) -> tree`.
        primals: where; other leaves than floats are constants.
        tangents: the direction; leaves opposite other leaves than floats are not read, and may be
            None.

    Returns:
        The derivative of the result, with None for leaves that are no floats.
    """
    split = _split(primals)
    kept = [leaf for leaf in jax.tree.leaves(tangents) if is_inexact(leaf)]

    def floats(leaves):
        result = jax.tree.leaves(function(*split.merge(leaves)))
        return [leaf for leaf in result if is_inexact(leaf)]

    _, moved = jax.jvp(floats, (split.leaves,), (kept,))
    shapes = jax.eval_shape(lambda: function(*primals))
    leaves, treedef = jax.tree.flatten(shapes)
    found = iter(moved)
    return treedef.unflatten([next(found) if is_inexact(leaf) else None for leaf in leaves])
