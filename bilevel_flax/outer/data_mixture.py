"""How much of which data to train on: x is a weight for each domain, or a network that weighs.

The training data comes in domains D_1 .. D_K, and a minibatch holds candidates of all of them, a
share q_d of each. What is learned is another mixture of the same data:

    G(z, x) = Σ_d p_d(x) E_{i ~ D_d} ℓ_i(z) = E_{i ~ q} w_i(x) ℓ_i(z)      w_i = p_{d(i)} / q_{d(i)}

with p = softmax(x / τ) (`domain_weights`), or w_i ∝ exp V(φ_i; x) for a small network V on cheap
features φ_i of an example, whatever its domain (`network_weights`). Two ways to use w:

* weighting: mean(w ℓ) over the minibatch. Every candidate is paid for, also those of weight 0.
* sampling: only B of the C candidates, drawn in proportion to w (`select`), enter the loss, with
  weights r_b that are 1 but for a constant, and whose derivative is that of log w:

      (1/B) Σ_b r_b ℓ_{i_b}      i_b ~ w / Σ w      r_b = (w / stop(w))_{i_b} · mean(stop(w))

  Its value and its derivatives with respect to z, to x and mixed have those of mean(w ℓ) as
  expectations. Weights that only say which candidates to read cost nothing but the reading.

References:
    D. Grangier, P. Ablin, A. Hannun. Adaptive training distributions with scalable online bilevel
    optimization. TMLR 2024 (also: Bilevel optimization to learn training distributions for
    language modeling under domain shift. NeurIPS 2023 workshop on distribution shifts).
    J. Carpenter, P. Clifford, P. Fearnhead. Improved particle filter for nonlinear problems. IEE
    Proceedings 1999 (systematic resampling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import PyTree
from bilevel_flax.checks import check_count
from bilevel_flax.minibatches import example_mask, integers
from bilevel_flax.tree import rows_at


class DataMixture(NamedTuple):
    """A parametrisation of the training distribution.

    Attributes:
        init: `init()`, where x starts.
        weights: `weights(outer_params, batch) -> [batch]`, w_i of a minibatch's examples, >= 0;
            their mean over the data, as the minibatches hold it, is 1.
        shares: `shares(outer_params, batch=None) -> [domains]`, the learned p_d, which sum to 1;
            `network_weights` estimates them on the `batch` and needs it.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> mixture = bf.outer.domain_weights(2)
        >>> x = mixture.init()
        >>> mixture.weights(x, {"domain": jnp.array([0, 1, 1])}).tolist()
        [1.0, 1.0, 1.0]
        >>> mixture.shares(x).tolist()
        [0.5, 0.5]
    """

    init: Callable[[], PyTree]
    weights: Callable[[PyTree, Mapping[str, Any]], jax.Array]
    shares: Callable[..., jax.Array]


class Selected(NamedTuple):
    """Which candidates enter the loss.

    Attributes:
        index: int32 [count], positions among the candidates.
        ratio: float [count], r_b: multiply the losses with it.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> chosen = bf.outer.select(jax.random.key(0), jnp.ones(8), count=2)
        >>> chosen.index.shape, chosen.ratio.shape
        ((2,), (2,))
    """

    index: jax.Array
    ratio: jax.Array


def _domains(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
    """The domains [batch] or [batch, tokens], 0 for padding, and what is real (None: all)."""
    domain, mask = integers(batch, "domain", "domain weights"), example_mask(batch)
    if mask is None:
        return domain, None
    real = jnp.expand_dims(mask > 0, tuple(range(1, domain.ndim)))
    return jnp.where(real, domain, 0), real


def domain_weights(
    num_domains: int,
    proposal: Sequence[float] | None = None,
    *,
    temperature: float = 1.0,
    reference: Any = None,
) -> DataMixture:
    """One logit for each domain, p = softmax(x / τ); the start is the data as it comes, p = q.

    With a reference r, a mixture that is known to be good, x = 0 is that one, and what is learned
    is by how much to read more or less of a domain: p_d ∝ r_d exp(x_d / τ).

    Args:
        num_domains: K, >= 2.
        proposal: q [K], the share of each domain in the minibatches, all positive (they are made
            to sum to 1); None: equal ones.
        temperature: τ > 0, the unit of x: with a smaller one the same steps of x go further. In a
            short run the mixture is else still under way when the run ends.
        reference: r [K], shares >= 0 (they are made to sum to 1); a domain without one is not read,
            whatever x. None: x starts where p = q.

    Returns:
        x is float32 [K]; `weights` reads `batch["domain"]`, integers [batch] in 0 .. K - 1 (one
        outside gives NaN, which stops the run). Padding has weight 0.

    Raises:
        ValueError: fewer than two domains, `proposal` is not K positive numbers, `temperature` is
            not positive, `reference` is no mixture; at trace time `batch["domain"]` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> mixture = domain_weights(2, proposal=(1, 3))
        >>> mixture.shares(jnp.zeros(2)).tolist()
        [0.5, 0.5]
        >>> mixture.weights(mixture.init(), {"domain": jnp.array([0, 1, 1])}).round(3).tolist()
        [1.0, 1.0, 1.0]
        >>> near = domain_weights(2, reference=(3, 1))
        >>> [round(float(share), 3) for share in near.shares(near.init())]
        [0.75, 0.25]
    """
    check_count("num_domains", num_domains, 2)
    given = np.ones(num_domains) if proposal is None else np.asarray(proposal, np.float64)
    if given.shape != (num_domains,) or not (given > 0).all() or not np.isfinite(given).all():
        raise ValueError(f"proposal={proposal!r} must be {num_domains} positive numbers")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be positive")
    share = jnp.asarray(given / given.sum(), jnp.float32)
    known = None if reference is None else _mixture(reference, num_domains)

    def shares(outer_params, batch=None):
        del batch
        logits = outer_params / temperature
        if known is None:
            return jax.nn.softmax(logits)
        read = known > 0
        return jax.nn.softmax(logits + jnp.log(jnp.where(read, known, 1.0)), where=read)

    def weights(outer_params, batch):
        if jnp.shape(outer_params) != (num_domains,):
            raise ValueError(
                f"outer_params has shape {jnp.shape(outer_params)}, but there are {num_domains} "
                f"domains: one logit for each, [{num_domains}]"
            )
        domain, real = _domains(batch)
        each = rows_at(shares(outer_params) / share, domain)
        return each if real is None else jnp.where(real, each, 0.0)

    # log 1 is exactly 0: equal shares start there.
    start = temperature * jnp.log(share * num_domains) if known is None else jnp.zeros(num_domains)
    return DataMixture(lambda: start, weights, shares)


def _mixture(reference: Any, num_domains: int) -> jax.Array:
    """[K], which sum to 1."""
    given = np.asarray(reference, np.float64)
    fine = given.shape == (num_domains,) and np.isfinite(given).all() and (given >= 0).all()
    if not fine or not given.any():
        raise ValueError(
            f"reference={reference!r} must be {num_domains} shares >= 0, one for each domain, not "
            "all 0"
        )
    return jnp.asarray(given / given.sum(), jnp.float32)


def network_weights(
    features: Callable[[Mapping[str, Any]], jax.Array],
    num_features: int,
    num_domains: int,
    *,
    hidden: int = 32,
    seed: int = 0,
) -> DataMixture:
    """Weights from a small network on features of the examples, finer than domains.

        w_i = C softmax(V(φ; x))_i over the C examples of the minibatch

    V has one hidden layer of tanh and starts flat, so that every weight is 1. The mean over a
    minibatch stands for that over the data: take minibatches of some dozens at least. C counts
    real examples; padding has weight 0.

    Args:
        features: φ, `features(batch) -> float [batch, num_features]`, of order 1.
        num_features: as it says.
        num_domains: K, for `shares` alone, which reads `batch["domain"]`.
        hidden: width of the hidden layer, >= 1.
        seed: of the first layer.

    Returns:
        The parametrisation; x is a dict of "first", float32 [num_features, hidden], and "last",
        float32 [hidden].

    Raises:
        ValueError: a size below 1.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> features = lambda batch: batch["length"][:, None]
        >>> mixture = bf.outer.network_weights(features, 1, num_domains=2)
        >>> batch = {"length": jnp.array([1.0, 2.0, 3.0]), "domain": jnp.array([0, 1, 1])}
        >>> mixture.weights(mixture.init(), batch).tolist()  # flat at first
        [1.0, 1.0, 1.0]
    """
    check_count("num_features", num_features)
    check_count("num_domains", num_domains)
    check_count("hidden", hidden)

    def init():
        first = jax.random.normal(jax.random.PRNGKey(seed), (num_features, hidden))
        return {"first": first, "last": jnp.zeros(hidden)}

    def weights(outer_params, batch):
        inputs, mask = jax.lax.stop_gradient(features(batch)), example_mask(batch)
        if inputs.ndim != 2 or inputs.shape[1] != num_features:
            raise ValueError(
                f"features(batch) has shape {inputs.shape}, but num_features={num_features}: "
                "return [batch, num_features]"
            )
        if mask is not None:
            inputs = jnp.where(mask[:, None] > 0, inputs, 0.0)  # padding need not be finite
        units = jnp.tanh(inputs @ outer_params["first"] / np.sqrt(num_features))
        # Divided here, not in the start: a step of x moves a logit as it moves one of a domain.
        logits = units @ outer_params["last"] / hidden
        if mask is None:
            return len(logits) * jax.nn.softmax(logits)
        real = (mask > 0) | ~jnp.any(mask > 0)  # of padding alone there is no softmax
        return jnp.sum(mask > 0).astype(logits.dtype) * jax.nn.softmax(logits, where=real)

    def shares(outer_params, batch=None):
        if batch is None:
            raise ValueError("shares of a network need a batch: shares(outer_params, batch)")
        domain, _ = _domains(batch)
        # A domain that there is not makes all shares NaN: `rows_at` says so, a scatter would not.
        inside = rows_at(jnp.ones(num_domains), domain)
        total = jnp.zeros(num_domains).at[domain].add(inside * weights(outer_params, batch))
        return jnp.where(jnp.isfinite(inside).all(), total / total.sum(), jnp.nan)

    return DataMixture(init, weights, shares)


def select(key: jax.Array, weights: jax.Array, count: int) -> Selected:
    """Draws candidates in proportion to their weights, as evenly as that can be done.

    Systematic resampling: one uniform number places a comb of `count` teeth over the cumulated
    weights, so that a candidate is taken ⌊B π_i⌋ or ⌈B π_i⌉ times, B π_i on average, and none
    twice unless π_i > 1/B. Candidates of one domain should lie together or in turn, not
    in an order that goes with their losses.

    Args:
        key: of the draw.
        weights: w, float [candidates], >= 0, not all 0; differentiable.
        count: B, how many to draw, >= 1.

    Returns:
        `index` and `ratio`: mean(ratio * losses[index]) stands for mean(weights * losses).

    Raises:
        ValueError: `count` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> chosen = select(jax.random.PRNGKey(0), jnp.array([0.0, 2.0, 0.0, 2.0]), 2)
        >>> chosen.index.tolist(), chosen.ratio.tolist()
        ([1, 3], [1.0, 1.0])
    """
    check_count("count", count)
    return comb(jax.random.uniform(key), weights, count)


def comb(offset: Any, weights: jax.Array, count: int) -> Selected:
    """What `select` draws when its uniform number is `offset`, in [0, 1)."""
    frozen = jax.lax.stop_gradient(weights)
    total = jnp.cumsum(frozen)
    teeth = (offset + jnp.arange(count, dtype=total.dtype)) / count * total[-1]
    # Rounding can put the last tooth on the total itself: then the last candidate with a weight.
    last = jnp.searchsorted(total, total[-1], side="left")
    index = jnp.minimum(jnp.searchsorted(total, teeth, side="right"), last)
    here = frozen[index]
    ratio = weights[index] / jnp.where(here > 0, here, 1.0) * jnp.mean(frozen)
    return Selected(index.astype(jnp.int32), ratio)
