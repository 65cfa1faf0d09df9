"""Which ways to the second derivatives work on a loss, and what stops the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from bilevel_flax.base import Batch, Problem, PyTree, TrainState, Variables
from bilevel_flax.base.condition import is_condition
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.solver import complete_by_state
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.agreement import disagreement
from bilevel_flax.oracles.jaxprs import coarsest, equations, float_dtypes
from bilevel_flax.oracles.kernel_rules import opaque_p
from bilevel_flax.oracles.kernels import by_reference
from bilevel_flax.oracles.stops import first_refusal, stop

FIRST_ORDER = "first_order"
_CONDITION = "the condition, of which the transposed Jacobian is needed"
_EXACT = ("forward_over_reverse", "reverse_over_reverse")


class Probe(NamedTuple):
    """What `probe` found.

    Attributes:
        stopped_by: for each mode ("forward_over_reverse", "reverse_over_reverse",
            "finite_differences", "first_order") the primitive or kernel that stops it; "" where it
            works.
        mode: the best one that works; the first three are values of `Problem(derivatives=)`,
            "first_order" is all that `bf.first_order` needs.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> probe = bf.oracles.probe(problem, point, 1.0)
        >>> probe.mode, probe.stopped_by["reverse_over_reverse"]
        ('forward_over_reverse', '')
    """

    stopped_by: Mapping[str, str]
    mode: str

    @property
    def message(self) -> str:
        """One line."""
        stopped = [f"{mode} by {name}" for mode, name in self.stopped_by.items() if name]
        works = [mode for mode, name in self.stopped_by.items() if not name]
        return f"derivatives of inner_loss: {', '.join(works)} work" + (
            f"; stopped are {', '.join(stopped)}" if stopped else ""
        )


def probe(
    problem: Problem,
    point: TrainState | Variables,
    batch: Batch | Any,
    *,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
) -> Probe:
    """Finds which ways to the second derivatives work on a problem's inner loss.

    The loss and its derivatives are traced, under `jit`, `scan` and `checkpoint` as they stand, and
    not run; but where there are kernels `with_reference` in it, the loss and its gradient are
    compared, once, with what they are on the references.

    Args:
        problem: the problem; stateful and per-sample ones too.
        point: a `TrainState` (its model state and key are used), or `Variables`.
        batch: an inner minibatch, or a `Batch` with one.
        model_state: of a stateful problem; None: the state's.
        rng: of a stateful problem; None: the state's.

    Returns:
        The best mode that works, and for each of the others what stops it.

    Raises:
        TypeError: the loss cannot be differentiated even once; names what stops it. Or `point` is
            something else.
        ValueError: a kernel and its reference compute different things; names the difference. Or
            there is no inner minibatch, or only the shapes of something.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean()
        >>> point = bf.Variables(jnp.zeros(2), jnp.zeros(2), jnp.ones(2))
        >>> bf.oracles.probe(bf.Problem(loss, loss), point, jnp.ones(2)).mode
        'forward_over_reverse'
    """
    check_problem(problem)
    at, model_state, rng = complete_by_state(point, model_state, rng)
    if problem.stateful and rng is None:
        rng = jax.random.PRNGKey(0)
    minibatch = batch.inner if isinstance(batch, Batch) else batch
    if minibatch is None and batch is not None:
        raise ValueError("batch has no inner minibatch: hand probe one, or bf.Batch(inner, outer)")
    for name, tree in (("point", at), ("batch", minibatch), ("model_state", model_state)):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"{name} has jax.ShapeDtypeStruct leaves: probe needs arrays, e.g. "
                f"jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), {name})"
            )
    loss, z, x, _ = losses.inner(
        problem, at.inner, at.outer, minibatch, model_state, rng if problem.stateful else None
    )

    if message := first_refusal("inner_loss", loss, z.leaves, x.leaves):
        raise TypeError(message)
    closed = jax.make_jaxpr(lambda *leaves: loss(*leaves)[0])(z.leaves, x.leaves)
    _check_references(closed, z.leaves, x.leaves)
    stopped = {mode: stop(loss, z.leaves, x.leaves, mode) for mode in _EXACT}
    of_z = jax.make_jaxpr(lambda leaves: loss(leaves, x.leaves)[0])(z.leaves)
    stopped["finite_differences"] = coarser(of_z, z.leaves)
    stopped[FIRST_ORDER] = ""
    if is_condition(problem.inner_loss):  # no other mode gives Jᵀv
        transposed = "reverse_over_reverse"
        stopped = {
            mode: name if mode == transposed else _CONDITION for mode, name in stopped.items()
        }
    return Probe(stopped, next(mode for mode, name in stopped.items() if not name))


def coarser(closed: Any, leaves: list) -> str:
    """The dtype in which a program computes, if it is coarser than its arguments; else ""."""
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)
    worst = max(float_dtypes(closed), key=lambda dtype: jnp.finfo(dtype).eps, default=None)
    if worst is None or float(jnp.finfo(worst).eps) <= eps:
        return ""
    return f"computations in {jnp.dtype(worst).name}"


def _check_references(closed: Any, z: list, x: list) -> None:
    if not any(eqn.primitive is opaque_p for eqn in equations(closed)):
        return
    sides = (("inner_params", z), ("outer_params", x))
    names = [f"its gradient in {side}, leaf {i}" for side, at in sides for i in range(len(at))]

    def evaluate(closed: Any) -> list:
        function: Callable = lambda z, x: jaxpr_as_fun(closed)(*z, *x)[0]
        # The value once more by itself: a rule of the user's may hide a kernel from its gradient.
        run = lambda z, x: ([function(z, x)], *jax.grad(function, (0, 1))(z, x))
        return list(jax.jit(run)(z, x))

    plain = by_reference(closed)
    pair = evaluate(closed), evaluate(plain)
    found = disagreement(["inner_loss", *names], *pair, coarsest(closed))
    if found:
        raise ValueError(f"with_reference: a kernel and its reference differ: {found}")
