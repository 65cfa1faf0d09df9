"""Which training examples help, which harm: influence functions, without training.

With a weight w_i = 1 for each of n training examples, G(z, w) = 1/n Σ_i w_i ℓ_i(z) + penalty(z),
the hypergradient of F in the weights is

    ∂F/∂w_i = 1/n ⟨∇ℓ_i(z), v⟩        H v = -∇F

one linear solve and one pass of products, and -∂F/∂w_i is by how much F changes, to first order,
when example i is left out and z is trained to the end again.

References:
    P. W. Koh, P. Liang. Understanding black-box predictions via influence functions. ICML 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bilevel_flax import checks
from bilevel_flax.base import Problem, PyTree, Variables
from bilevel_flax.data import FiniteSum, partition
from bilevel_flax.diagnostics.hypergradient import hypergradient_check
from bilevel_flax.minibatches import example_mask, masked_mean
from bilevel_flax.tree import zeros_like


class Influence(NamedTuple):
    """What leaving out each training example would do to F.

    Attributes:
        change: float [n], F without the example minus F as it is, to first order. Negative: the
            example harms. The most harmful first is `np.argsort(change)`.
        residual: ‖Hv + ∇F‖ / ‖∇F‖, how well the linear system was solved.
        converged: whether that is below the tolerance. A network with fewer examples than
            parameters has a singular H, and never converges without `damping`; the order of the
            examples is useful long before.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> losses = lambda params, batch: 0.5 * (batch["y"] - params) ** 2
        >>> found = bf.diagnostics.influence(
        ...     losses,
        ...     np.float32(3.0),
        ...     train={"y": np.array([1.0, 1.0, 7.0], np.float32)},
        ...     clean={"y": np.array([1.0], np.float32)},
        ... )
        >>> int(np.argsort(found.change)[0]), found.converged  # the most harmful example
        (2, True)
    """

    change: np.ndarray
    residual: float
    converged: bool


def influence(
    losses: Callable[[PyTree, Mapping[str, Any]], Any],
    params: PyTree,
    train: Mapping[str, Any],
    clean: Mapping[str, Any],
    *,
    penalty: Callable[[PyTree], Any] | None = None,
    damping: float = 0.0,
    batch_size: int = 256,
    method: str = "auto",
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> Influence:
    """First-order effect on the clean loss of leaving out each training example.

    Args:
        losses: `losses(params, batch) -> [batch]`, each example's own loss, in evaluation mode.
        params: the trained network, near a minimum of the training loss.
        train: a dict of arrays [n, ...].
        clean: a dict of arrays [m, ...]; F is the mean of `losses` over it.
        penalty: `penalty(params) -> scalar`, what was added to the mean training loss.
        damping: δ >= 0 added to H's diagonal; a network that was not trained to the end wants
            some, 1e-3 of H's largest eigenvalue say.
        batch_size: examples a product takes at once; memory only.
        method: "dense", "minres" or "auto", as `hypergradient_check`.
        max_iterations: of MINRES.
        tolerance: the relative residual at which MINRES stops.

    Raises:
        TypeError: `train` or `clean` is no dict of arrays.
        ValueError: `losses` does not return one number an example; `damping` < 0; the arrays of a
            side differ in length.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilevel_flax as bf
        >>> def losses(mean, batch):
        ...     return 0.5 * (batch["y"] - mean) ** 2
        >>> train = {"y": np.array([1.0, 1.0, 7.0], np.float32)}
        >>> clean = {"y": np.array([1.0], np.float32)}
        >>> influence = bf.diagnostics.influence(losses, jnp.float32(3.0), train, clean)
        >>> [round(float(change), 3) for change in influence.change]  # the 7 harms
        [1.333, 1.333, -2.667]
    """
    checks.at_least("damping", damping)
    sides = (_parts(train, batch_size), _parts(clean, batch_size))

    def one_each(params: PyTree, batch: Any):
        found, count = jnp.asarray(losses(params, batch)), len(batch["index"])
        if found.shape != (count,):
            raise ValueError(
                f"losses returned shape {found.shape} for {count} examples: return each example's "
                "own loss, [batch], not their mean"
            )
        return found

    def inner_loss(params, weights, batch):
        mean = masked_mean(weights * one_each(params, batch), example_mask(batch))
        return mean if penalty is None else mean + penalty(params)

    def outer_loss(params, weights, batch):
        del weights
        return masked_mean(one_each(params, batch), example_mask(batch))

    problem = Problem(inner_loss, outer_loss, per_sample=True)
    weights = jnp.ones(sides[0].num_samples)
    check = hypergradient_check(
        problem,
        Variables(params, zeros_like(params), weights),
        *sides,
        damping=damping,
        method=method,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    return Influence(-np.asarray(check.reference), check.reference_residual, check.converged)


def _parts(arrays: Mapping[str, Any], batch_size: int) -> FiniteSum:
    # What is no dict of arrays `partition` names.
    rows = len(next(iter(arrays.values()))) if isinstance(arrays, Mapping) and arrays else 1
    return partition(arrays, min(batch_size, rows), shuffle=False)
