"""What a nested method's step works with: minibatches, the oracles on them, inner SGD.

A `Minibatch` has its factor N·w_i and its rng key; with a leading axis it is many, and `scan` walks
over them. It keeps its key wherever it is evaluated in an update, so that methods which compare two
points see the same noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Aux, Problem, PyTree, Variables
from bilevel_flax.minibatches import scale
from bilevel_flax.solvers.step import optimizer_step
from bilevel_flax.tree import filter_inexact, is_inexact, masked, norm, plus_decay


class Minibatch(NamedTuple):
    """One minibatch, or several with a leading axis on every leaf."""

    data: PyTree
    factor: jax.Array | None  # N·w_i, None for equal minibatches
    rng: jax.Array | None  # key of a stateful loss


class OuterGrads(NamedTuple):
    """F at one point on one minibatch."""

    out: tuple[jax.Array, Aux]  # (loss, aux)
    inner: PyTree  # ∇₁F
    outer: PyTree  # ∇₂F, None for per-sample leaves


def axpy(factor: Any, tree: PyTree, other: PyTree) -> PyTree:
    """Factor · tree + other on the float leaves, in the dtypes of `other`."""

    def leaf(a, b):
        if not is_inexact(b):
            return b
        return b + jnp.asarray(factor, b.dtype) * a

    return jax.tree.map(leaf, tree, other)


def difference(tree: PyTree, other: PyTree) -> PyTree:
    """Tree - other on the float leaves."""
    return axpy(-1.0, other, tree)


def completed(grad: PyTree, x: PyTree) -> PyTree:
    """∇₂F in x's tree: zero for the per-sample leaves."""
    return jax.tree.map(
        lambda term, leaf: None if leaf is None else jnp.zeros_like(leaf) if term is None else term,
        grad,
        x,
        is_leaf=lambda node: node is None,
    )


def split(minibatches: Minibatch, *sizes: int) -> list[Minibatch]:
    """Consecutive parts of the leading axis."""
    parts, start = [], 0
    for size in sizes:
        parts.append(jax.tree.map(lambda leaf, a=start, b=start + size: leaf[a:b], minibatches))
        start += size
    return parts


def scan(body: Callable, carry: Any, minibatches: Minibatch, times: int | None = None):
    """`jax.lax.scan` over the Minibatches, or `times` times on one and the same Minibatch."""
    if times is None:
        return jax.lax.scan(body, carry, minibatches)
    return jax.lax.scan(lambda carry, _: body(carry, minibatches), carry, length=times)


def first(tree: PyTree) -> PyTree:
    """The first entry of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def at_step(value: Any, step: jax.Array) -> Any:
    """A number, or a schedule's value at the update `step`."""
    return value(step) if callable(value) else value


@dataclasses.dataclass(frozen=True, eq=False)
class SampledOracles:
    """The oracles on a `Minibatch`, scaled by N·w_i, and the optimisers.

    Attributes:
        problem: the bilevel problem.
        transforms: the optimisers of z, v and x.
        model_state: what a stateful loss is handed.
        trainable: a tree like z of booleans, False for leaves that z's optimiser never moves: they
            are constants, so that ∇₁F and ∇²₁₁G have no entries for them. None: all move.
        decay: λ for each float leaf of z, where z's optimiser adds λz to its gradient: Hessian
            products are those of H + λI. None: it adds nothing.
        differentiated: the inner loop is differentiated through: ∇₁G in mixed mode, and of every
            step its start alone is kept.
    """

    problem: Problem
    transforms: Variables
    model_state: PyTree
    trainable: PyTree = None
    decay: PyTree = None
    differentiated: bool = False

    def constrain(self, tree: PyTree) -> PyTree:
        """A tree like z with zeros for the leaves that do not move."""
        return masked(tree, self.trainable)

    def after(self, aux: Aux) -> SampledOracles:
        """The oracles once F has been evaluated: with its model state if it updates it."""
        if not self.problem.outer_updates_state:
            return self
        return dataclasses.replace(self, model_state=aux.model_state)

    def inner_grad(self, z, x, minibatch: Minibatch):
        """`((G, aux), ∇₁G)`."""
        mixed, plain = oracles.differentiable_inner_grad, oracles.inner_value_and_grad
        gradient = mixed if self.differentiated else plain
        out, grad = gradient(self.problem, z, x, minibatch.data, self.model_state, minibatch.rng)
        return out, scale(grad, minibatch.factor)

    def inner_grad_outer(self, z, x, minibatch: Minibatch) -> PyTree:
        """∇₂G, dense."""
        grad = oracles.inner_grad_outer(
            self.problem, z, x, minibatch.data, self.model_state, minibatch.rng
        )
        return rows.densify(scale(grad, minibatch.factor), x)

    def hvp(self, z, v, x, minibatch: Minibatch) -> PyTree:
        """∇²₁₁G v + λv."""
        point = Variables(z, v, x)
        product = oracles.hvp(self.problem, point, minibatch.data, self.model_state, minibatch.rng)
        return self._regularised(scale(product, minibatch.factor), v)

    def _regularised(self, product: PyTree, v: PyTree) -> PyTree:
        return self.constrain(plus_decay(product, self.decay, v))

    def cross_jvp(self, z, v, x, minibatch: Minibatch) -> PyTree:
        """∇²₂₁G v; per-sample leaves are `Rows`."""
        point = Variables(z, v, x)
        product = oracles.cross_jvp(
            self.problem, point, minibatch.data, self.model_state, minibatch.rng
        )
        return scale(product, minibatch.factor)

    def state_for_outer(self, after: Aux | None) -> PyTree:
        """The model state for F: the one that G returned (`after`) if F updates it further."""
        if after is None or not self.problem.outer_updates_state:
            return self.model_state
        return after.model_state

    def outer_grads(self, z, x, minibatch: Minibatch, after: Aux | None = None) -> OuterGrads:
        """F's gradients; `after`: the aux of the G before it."""
        state = self.state_for_outer(after)
        out, *grads = oracles.outer_value_and_grads(
            self.problem, z, x, minibatch.data, state, minibatch.rng
        )
        grad_z, grad_x = scale(tuple(grads), minibatch.factor)
        return OuterGrads(out, self.constrain(grad_z), grad_x)

    def direction(self, z, v, x, minibatch: Minibatch, outer: OuterGrads):
        """`(Hv, D_x)` with D_x = ∇²₂₁G v + ∇₂F.

        Hv comes out of the differentiated backprop that makes the cross-JVP. It is a diagnostic,
        not counted, and compiled away where it is not used.
        """
        _, _, product, cross = oracles.inner_products(
            self.problem, Variables(z, v, x), minibatch.data, self.model_state, minibatch.rng
        )
        product, cross = scale((product, cross), minibatch.factor)
        return self._regularised(product, v), rows.add(cross, outer.outer)

    def inner_step(self, z, opt_state, x, minibatch: Minibatch, value, direction):
        """Z's optimiser, fed `direction`; what else it may ask for goes by Optax's names."""

        def at(params):
            merged = jax.tree.map(
                lambda new, old: old if new is None else new,
                params,
                z,
                is_leaf=lambda node: node is None,
            )
            (value, _), grad = self.inner_grad(merged, x, minibatch)
            return value, filter_inexact(grad)

        return optimizer_step(
            self.transforms.inner,
            direction,
            opt_state,
            z,
            value=value,
            grad=filter_inexact(direction),
            value_fn=lambda params: at(params)[0],
            grad_fn=lambda params, _: at(params)[1],
            outer_params=x,
        )

    def inner_sgd(self, z, opt_state, x, minibatches: Minibatch, times: int | None = None):
        """One step of the inner optimiser on each Minibatch, or `times` steps on one.

        Returns:
            `(z, opt_state, (G, aux) of the first, ‖∇₁G‖ of each)`.
        """

        def body(carry, minibatch):
            z, opt_state = carry
            out, grad = self.inner_grad(z, x, minibatch)
            carry = self.inner_step(z, opt_state, x, minibatch, out[0], grad)
            # The norm's derivative at 0 is NaN, and `unrolled` differentiates through this loop.
            return carry, (out, norm(jax.lax.stop_gradient(grad)))

        if self.differentiated:
            body = jax.checkpoint(body, prevent_cse=False)
        (z, opt_state), (outs, norms) = scan(body, (z, opt_state), minibatches, times)
        return z, opt_state, first(outs), norms
