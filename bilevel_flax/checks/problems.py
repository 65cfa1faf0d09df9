"""Checks of a user's problem at trace time: they cost nothing in the compiled step."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Problem, PyTree, Variables
from bilevel_flax.base.condition import is_condition
from bilevel_flax.checks.arguments import UserError, check_partition
from bilevel_flax.oracles.derivatives import check_adjoint
from bilevel_flax.oracles.jaxprs import primitives
from bilevel_flax.oracles.losses import checked_call, inner, outer
from bilevel_flax.oracles.stops import refusal
from bilevel_flax.tree import depends_on, is_inexact, split


def parameters(name: str, tree: PyTree) -> None:
    """Raises unless `tree` has at least one floating-point leaf and only arrays.

    Raises:
        TypeError: a leaf is no array, or complex, or there is an NNX module in it.
        ValueError: nothing in it can be learned.
    """
    nnx: Any = sys.modules.get("flax.nnx")  # where it was never imported, there is no module of it
    is_module = lambda node: nnx is not None and isinstance(node, (nnx.Pytree, nnx.State))
    for node in jax.tree.leaves(tree, is_leaf=is_module):
        if is_module(node):
            raise TypeError(
                f"{name} holds the NNX {type(node).__name__}, but a solver takes arrays: write the "
                "losses for bf.nnx.problem and start with bf.nnx.init or bf.nnx.Optimizer"
            )
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, (jax.Array, float, int)) and not hasattr(leaf, "__array__"):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; "
                "parameters are pytrees of arrays"
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}, and the methods' "
                "inner products are those of real vectors: give its real and imaginary part as two "
                "leaves, and join them inside the loss"
            )
    if not any(is_inexact(leaf) and jnp.size(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} has no floating-point leaf with an entry, so there is nothing to learn: "
            f"{tree!r:.80}"
        )


def per_sample(problem: Problem, outer_params: PyTree) -> None:
    """Raises unless every per-sample leaf is a float array [n, ...].

    Raises:
        ValueError: the mask does not fit `outer_params`, or a leaf has no leading axis.
    """

    def check(leaf):
        if jnp.ndim(leaf) < 1 or not is_inexact(leaf):
            raise ValueError(
                "a per-sample leaf of outer_params must be a float array [n, ...] with one row "
                f"for each training example, got {jnp.result_type(leaf)}{jnp.shape(leaf)}"
            )

    rows.map_prefix(problem.per_sample, check, lambda leaf: None, outer_params)


def host_moves_z(inner: Any, adjoint: Any) -> None:
    """Raises where z's optimiser is not known, and v has none of its own.

    Raises:
        UserError: both are None.
    """
    if inner is None and adjoint is None:
        raise UserError(
            "inner=None leaves z to a host whose optimiser is not known here, and v needs one: "
            "pass adjoint=, best the same as the host's, e.g. adjoint=optax.adam(1e-3)"
        )


def hosts_z(inner: Any, inner_params: PyTree, state: Any) -> None:
    """Raises unless the host's z may come in, and is one that the state's v was made for.

    Raises:
        UserError: the solver moves z itself, or the trees differ.
    """
    if inner is not None:
        raise UserError(
            "inner_params= hands over a z that a host moves, but inner= moves it here: make the "
            "solver with inner=None, or leave inner_params out"
        )
    check_adjoint(inner_params, state.adjoint)


def losses(
    problem: Problem,
    variables: Variables,
    batch: Batch,
    model_state: PyTree,
    rng: Any,
    also: Callable[[PyTree], PyTree] = lambda x: (),
    second_order: bool = True,
) -> None:
    """Raises when a leaf of x can influence neither G nor `also(x)`, or G cannot be derived twice.

    The latter is asked where there is `second_order`.

    A condition's x may have leaves for F alone (a read-out of the fixed point).

    Raises:
        UserError: a minibatch without an example.
        ValueError: names the first such leaf; or G does not depend on z at all.
        TypeError: a `jax.custom_vjp` function, which forward mode cannot differentiate.
    """
    _refuse_no_examples(batch)
    z, _, x = variables
    paths = jax.tree.leaves_with_path(x)

    def loss(x, z=z):
        visible = rows.gather(problem.per_sample, x, batch.inner)
        args = (z, visible, batch.inner)
        context = (model_state, rng)
        return checked_call(problem.inner_loss, "inner_loss", problem.stateful, args, context)[0]

    def outer_loss(x):
        if not is_condition(problem.inner_loss) or batch.outer is None:
            return ()
        args, context = (z, x, batch.outer), (model_state, rng)
        return checked_call(problem.outer_loss, "outer_loss", problem.stateful, args, context)[0]

    jaxpr = jax.make_jaxpr(loss)(x)
    if not second_order:
        pass
    elif problem.derivatives == "finite_differences":
        _differences_resolve(jaxpr, z)
    elif any(name.startswith("custom_vjp_call") for name in primitives(jaxpr)):
        _differentiable_twice(problem, z, x, batch.inner, model_state, rng)
    if not any(depends_on(lambda z: loss(x, z), z)):
        raise ValueError(
            "inner_loss never uses inner_params, so there is nothing to train: losses are called "
            "as inner_loss(inner_params, outer_params, batch)"
        )
    used = depends_on(lambda x: (loss(x), outer_loss(x), also(x)), x)
    for (path, leaf), alive in zip(paths, used, strict=True):
        if is_inexact(leaf) and not alive:
            raise ValueError(
                f"inner_loss never uses outer_params{jax.tree_util.keystr(path)}, so nothing can "
                "be learned about it: use it in inner_loss or take it out of outer_params"
            )


def _refuse_no_examples(batch: Batch) -> None:
    """Raises where all arrays of a side have the leading length 0: of a mean over none no step."""
    for side in ("inner", "outer"):
        leaves = jax.tree.leaves_with_path(getattr(batch, side))
        arrays = [(path, jnp.shape(leaf)) for path, leaf in leaves if jnp.ndim(leaf)]
        if arrays and not any(shape[0] for _, shape in arrays):
            path, shape = arrays[0]
            raise UserError(
                f"batch.{side}{jax.tree_util.keystr(path)} has shape {shape}: a minibatch without "
                "an example; leave it out, or pad it and mask all of it"
            )


def _differences_resolve(jaxpr: Any, z: PyTree) -> None:
    """Raises where a loss rounds z, so that differences of its gradients are noise."""
    from bilevel_flax.oracles.derivative_modes import coarser  # few ask for differences

    if name := coarser(jaxpr, split(z).leaves):
        raise ValueError(
            f'derivatives="finite_differences" with {name} in inner_loss: differences of gradients '
            "are noise there; lend the kernel a reference, bf.oracles.with_reference(kernel, "
            "reference), or compute in the parameters' dtype"
        )


def _differentiable_twice(
    problem: Problem, z: PyTree, x: PyTree, batch: PyTree, model_state: PyTree, rng: Any
) -> None:
    """Raises where a kernel with a `jax.custom_vjp` cannot be differentiated as asked for.

    JAX itself says so when it compiles, far from the loss: under `jit` and `scan` it has no name
    left.
    """
    loss, z_split, x_split, _ = inner(problem, z, x, batch, model_state, rng)
    if message := refusal(loss, z_split.leaves, x_split.leaves, problem.derivatives):
        raise TypeError(message)


def check_sum(
    problem: Problem,
    name: str,
    num_inner_batches: Any,
    num_outer_batches: Any,
    weights: Mapping[str, Any],
) -> None:
    """Raises unless the problem is a finite sum of so many minibatches; warns where it may not be.

    Args:
        problem: the problem.
        name: the method's.
        num_inner_batches: N.
        num_outer_batches: M.
        weights: `inner_weights` and `outer_weights`, or None.

    Raises:
        ValueError: names the argument and its value.
    """
    for side, count in (("inner", num_inner_batches), ("outer", num_outer_batches)):
        check_partition(
            f"num_{side}_batches", count, f"{side}_weights", weights.get(f"{side}_weights")
        )
    warn_unless_finite_sum(problem, name)


def has_value(problem: Problem, name: str) -> None:
    """Raises where the inner problem is a condition, which has no value to be lowered.

    Args:
        problem: the problem.
        name: the method's, or the optimiser's.

    Raises:
        UserError: names the method.
    """
    if is_condition(problem.inner_loss):
        raise UserError(
            f"{name} needs the value of inner_loss, and Problem.from_condition has none: take a "
            "method or an optimiser that uses gradients alone (soba, auto, implicit; optax.sgd)"
        )


def outer_loss_sees_all(
    problem: Problem, variables: Variables, batch: PyTree, model_state: PyTree, rng: Any
) -> None:
    """Raises when ∇₂F is zero by construction for a leaf of x.

    Args:
        problem: the problem.
        variables: the point.
        batch: an outer minibatch.
        model_state: for a stateful outer loss.
        rng: its key.

    Raises:
        ValueError: names the first such leaf.
    """
    z, _, x = variables
    loss, z_split, x_split = outer(problem, z, x, batch, model_state, rng)
    floats = [path for path, leaf in jax.tree.leaves_with_path(x) if is_inexact(leaf)]
    used = depends_on(lambda leaves: loss(z_split.leaves, leaves)[0], x_split.leaves)
    if rows.has_rows(problem.per_sample):
        used = [False] * len(floats)
    for path, alive in zip(floats, used, strict=True):
        if not alive:
            raise ValueError(
                f"outer_loss never uses outer_params{jax.tree_util.keystr(path)}, and a method "
                "without an adjoint sees nothing else: take one with, e.g. soba"
            )


def warn_unless_finite_sum(problem: Problem, name: str) -> None:
    """Warns that a stateful loss is no sum of fixed terms, which variance reduction relies on."""
    if problem.stateful:
        warnings.warn(
            f"{name} compares visits of the same minibatch. The rng key is fixed for each "
            "minibatch id, so dropout and augmentation repeat themselves; BatchNorm's running "
            "statistics still change between visits, which leaves noise that it cannot remove",
            stacklevel=3,
        )
