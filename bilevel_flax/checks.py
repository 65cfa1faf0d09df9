"""Checks of a user's problem at trace time: they cost nothing in the compiled step."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Info, Problem, PyTree, Table, Variables
from bilevel_flax.base.condition import is_condition
from bilevel_flax.oracles.derivatives import check_adjoint
from bilevel_flax.oracles.jaxprs import primitives
from bilevel_flax.oracles.losses import checked_call, inner, outer
from bilevel_flax.oracles.probe import coarser
from bilevel_flax.oracles.stops import refusal
from bilevel_flax.tree import depends_on, is_inexact, split


class UserError(ValueError):
    """A mistake of whoever calls: one line that names the argument, the value and the fix.

    The command line prints it without a stack trace and ends with exit code 2.
    """


def copied(tree: PyTree) -> PyTree:
    """A copy of every leaf as a strongly typed array, so that no two leaves share a buffer.

    Tables are taken as they are: whoever makes one makes a new one, and two would not fit.
    """

    def copy(node):
        if isinstance(node, Table):
            return node
        return jnp.array(node, jnp.result_type(node), copy=True)

    return jax.tree.map(copy, tree, is_leaf=lambda node: isinstance(node, Table))


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
    if not any(is_inexact(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} has no floating-point leaf, so there is nothing to learn: {tree!r:.80}"
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


def check_finite(info: Info, step: Any = None) -> None:
    """Raises where an update met a direction or a loss that is not finite (`not info.ok`).

    It waits for the device: in a loop of your own call it every so often.

    Args:
        info: what `solver.update` returned.
        step: its number, for the message.

    Raises:
        FloatingPointError: names the directions and losses, and the likely causes.
    """
    directions = ("inner (D_z)", "adjoint (D_v)", "outer (D_x)")
    lost = [side for side, fine in zip(directions, info.finite, strict=True) if not np.all(fine)]
    losses = [name for name in ("inner_loss", "outer_loss") if not _all_finite(getattr(info, name))]
    if not lost and not losses:
        return
    if losses:
        causes = (
            'NaN in the data, a label outside the classes, batch["index"] outside the n rows, '
            "batch.inner_id or outer_id outside the minibatches, or a domain that there is not"
        )
    elif not np.all(info.finite.inner):
        causes = (
            "batch.inner_id or outer_id outside the method's minibatches, a loss without a finite "
            "derivative (sqrt or log at 0), or too long an inner step"
        )
    elif not np.all(info.finite.adjoint):
        causes = (
            "too long an adjoint step (above 2 over the inner loss's largest curvature), or "
            "batch.outer_id outside the method's minibatches"
        )
    else:
        causes = "too long an outer step"
    parts = [f"the direction of {', '.join(lost)}"] if lost else []
    parts += losses
    raise FloatingPointError(
        f"{'update' if step is None else f'step {step}'}: not finite: {' and '.join(parts)}; "
        f"{'the state stands still since; ' if lost else ''}likely {causes}"
    )


def _all_finite(values: Any) -> bool:
    return values is None or bool(np.all(np.isfinite(np.asarray(values, np.float64))))


def problem(value: Any) -> None:
    """Raises unless `value` is a `Problem`.

    Raises:
        TypeError: a loss, a tuple of two, or anything else.
    """
    if not isinstance(value, Problem):
        raise TypeError(
            f"problem={value!r:.60} is no bf.Problem: pass bf.Problem(inner_loss, outer_loss)"
        )


def key(name: str, value: Any) -> None:
    """Raises unless `value` is a PRNG key, or None.

    Raises:
        TypeError: a seed, or anything else.
    """
    dtype = getattr(value, "dtype", None)
    if value is None or (dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        return
    if dtype != np.uint32 or np.ndim(value) != 1:
        seed = value if isinstance(value, numbers.Integral) else 0
        raise TypeError(f"{name}={value!r:.40} is no key: pass {name}=jax.random.key({seed})")


def at_least(name: str, value: Any, least: float = 0.0) -> None:
    """Raises unless `value` is a number >= `least`.

    Raises:
        TypeError: no number.
        ValueError: below, or NaN.
    """
    is_scalar = hasattr(value, "dtype") and np.ndim(value) == 0
    if not (isinstance(value, numbers.Real) or is_scalar):
        raise TypeError(f"{name}={value!r:.40} must be a number >= {least:g}")
    if not float(value) >= least:
        raise ValueError(f"{name}={value} must be >= {least:g}")


def learning_rate(name: str, value: Any) -> None:
    """Raises unless `value` is a schedule or a number >= 0.

    Raises:
        TypeError: neither.
        ValueError: a negative number.
    """
    if not callable(value):
        at_least(name, value)


def optimizer(name: str, value: Any) -> optax.GradientTransformation:
    """`value`, if it is an Optax optimiser.

    Args:
        name: the argument's, for the error.
        value: what was passed.

    Raises:
        TypeError: an optimiser that was not called, a learning rate, a training state, or anything
            else without `init` and `update`.
    """
    if isinstance(value, optax.GradientTransformation):
        return value
    fix = f"pass {name}=optax.adam(1e-3), or another Optax optimiser"
    if isinstance(value, numbers.Real):
        fix = f"pass an optimiser with this step, {name}=optax.sgd({value!r})"
    elif isinstance(getattr(value, "tx", None), optax.GradientTransformation):
        fix = f"pass the optimiser in it, {name}=state.tx"
    elif callable(value):
        called = getattr(value, "__name__", type(value).__name__)
        fix = f"call it with its step, {name}={called}(1e-3); a schedule goes into an optimiser"
    elif callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return value
    raise TypeError(f"{name}={value!r:.60} is no optimiser: {fix}")


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


def batch(value: Any, *, sides: tuple[str, ...] = ("inner", "outer")) -> None:
    """Raises unless `value` is a `Batch` with data on the sides that are needed.

    Raises:
        TypeError: a tuple, a dict, or anything else.
        ValueError: a side without data.
    """
    if not isinstance(value, Batch):
        raise TypeError(
            f"batch is a {type(value).__name__}, but must be "
            "bf.Batch(training_minibatch, validation_minibatch)"
        )
    for side in sides:
        if getattr(value, side) is None:
            raise ValueError(
                f"batch.{side} is None, but an update takes a minibatch of each side: "
                "bf.Batch(training_minibatch, validation_minibatch)"
            )


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
        ValueError: names the first such leaf; or G does not depend on z at all.
        TypeError: a `jax.custom_vjp` function, which forward mode cannot differentiate.
    """
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


def _differences_resolve(jaxpr: Any, z: PyTree) -> None:
    """Raises where a loss rounds z, so that differences of its gradients are noise."""
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


def require_ids(batch: Batch, name: str, needed: dict[str, bool], scalars: bool = False) -> None:
    """Raises where `needed[side]` and the side has data but no id, or an id is no integer.

    Args:
        batch: the minibatches.
        name: the method's.
        needed: whether the ids are read, by side.
        scalars: whether the method takes one minibatch of each side.

    Raises:
        TypeError: names the id that is no integer.
        ValueError: names the missing one, or the one that is no scalar.
    """
    for side, needs in needed.items():
        position = getattr(batch, f"{side}_id")
        if position is not None and not jnp.issubdtype(jnp.result_type(position), jnp.integer):
            raise TypeError(
                f"batch.{side}_id={position!r:.40} must be an integer, the minibatch's position in "
                f"the partition, got {jnp.result_type(position)}"
            )
        if position is not None and scalars and jnp.ndim(position):
            raise ValueError(
                f"batch.{side}_id has shape {jnp.shape(position)}, but must be a scalar: "
                f"{name or 'this solver'} takes one minibatch of each side"
            )
        if needs and position is None and getattr(batch, side) is not None:
            raise ValueError(
                f"batch.{side}_id is None, but {name or 'this solver'} needs the minibatch's "
                "position in the partition: Batch(inner, outer, inner_id=i, outer_id=j)"
            )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises unless `value` is an integer >= `least`.

    Raises:
        UserError: names the argument and the value.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be an integer >= {least}, got {value!r}")


def as_count(name: str, value: Any, least: int = 1) -> int:
    """The value as a Python integer.

    Raises:
        ValueError: it is no integer >= `least`; names the argument and the value.
    """
    check_count(name, value, least)
    return int(value)


def check_positive(name: str, value: Any) -> None:
    """Raises unless `value` is a schedule or a positive finite number.

    Raises:
        UserError: names the argument and the value.
    """
    if callable(value):
        return
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise UserError(f"{name} must be a positive number or a schedule, got {value!r}")


def check_partition(count_name: str, count: Any, weights_name: str, weights: Any) -> None:
    """Raises unless there is a positive number of minibatches and a weight for each.

    Raises:
        UserError: names the arguments and their values.
    """
    check_count(count_name, count)
    if weights is not None and np.shape(weights) != (count,):
        raise ValueError(
            f"{weights_name} has shape {np.shape(weights)}, but {count_name} is {count}: "
            "pass one share for each minibatch (FiniteSum.weights)"
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
