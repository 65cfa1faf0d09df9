"""The weights that are learned on top of the reference: of domains, and of windows by their looks.

A window is read because of its domain, or for the target's sake: from its sample, or because it
looks like it, whatever its domain:

    p = softmax(log r + x)        σ_i = sigmoid(β (s_i - t))
    w_i = (p_d(i) + p_T a(u) [i of the sample]) / q_d(i) + p_T (1 - a(u)) C σ_i / Σ σ

with s_i the score of a window (`scores`: mean 0 and deviation 1 in the pool), sums over the
candidates of the pool, C of all, and β = β_0 exp(x_β). The threshold t is where Σ σ is as many as
are to be read, so that the best are read once and none twice (a softmax would read the very best
many times over). x holds a logit for each domain, one for the target, and x_β; at x = 0 all of it
is the reference. How often the sample is read again is not left to x: the hypergradient is that of
this moment, and knows nothing of what is used up.

References:
    D. A. Calian et al. DataRater: meta-learned dataset curation. 2025 (a network on examples, top-k
    within a batch of candidates).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf

SLOPE = 16.0  # β_0: near the top k
_HALVINGS = 30
_LOWEST, _NEVER = -50.0, -1e4  # deviations from the mean: no window is there


def scores(table: np.ndarray, pool: np.ndarray) -> Callable[[Any], jax.Array]:
    """`scores(tokens [..., length + 1]) -> [...]`, a mean over pairs of bytes.

    Args:
        table: of each pair of bytes, [65536].
        pool: windows of the pool, [n, length + 1].
    """
    raw = lambda tokens, values: values[_pairs(tokens)].mean(-1)
    seen = raw(pool, table)
    values = jnp.asarray((table - seen.mean()) / max(seen.std(), 1e-6), jnp.float32)
    return lambda tokens: raw(tokens, values)


def _pairs(tokens: Any) -> Any:
    wide = tokens.astype("int32") % 256  # of another tokeniser's: hashed
    return wide[..., :-1] * 256 + wide[..., 1:]


def top(found: jax.Array, slope: jax.Array, count: jax.Array) -> jax.Array:
    """The threshold t with Σ sigmoid(slope (s_i - t)) = count, as a constant."""
    found, slope, count = jax.lax.stop_gradient((found, slope, count))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        many = jax.nn.sigmoid(slope * (found - middle)).sum() > count
        return jnp.where(many, middle, low), jnp.where(many, high, middle)

    low, high = jnp.full_like(slope, _LOWEST), found.max() + 20.0 / slope
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return (low + high) / 2


def curriculum(
    shares: np.ndarray,
    rises: np.ndarray,
    searched: np.ndarray,
    score: Callable[[Any], jax.Array],
    *,
    rate: float,
    released: float,
    temperature: float,
) -> bf.outer.DataMixture:
    """The mixture; its batches have `tokens`, `domain`, `part` and `progress`.

    Args:
        shares: r, of the domains and last of the target, [domains + 1].
        rises: a at evenly spaced points of the run, the target's sample's part in its share,
            [stages].
        searched: bool [domains], whose windows are read for their looks.
        score: of windows.
        rate: windows that are read for each candidate.
        released: the progress up to which the sample's part 0 is read, which F does not hold; then
            it is part 1, all of it. 1: never.
        temperature: as of `domain_weights`.

    Returns:
        x is `{"shares": float32 [domains + 1], "slope": float32 []}`; `shares(x, batch)` gives the
        domains' and last the sample's, windows that look like it counted where they come from.
    """
    count = len(shares) - 1
    proposal = np.array([1] * count + [2])  # the sample comes twice
    by_domain = bf.outer.domain_weights(count + 1, temperature=temperature, reference=shares)
    places = np.linspace(0, 1, len(rises))
    looked_at = jnp.asarray([*searched, False])

    def parts(outer_params, batch):
        """Shares of the domains and of the sample, [domains + 1], and of what looks like it."""
        p = by_domain.shares(outer_params["shares"])
        rise = jnp.interp(jnp.asarray(batch["progress"], jnp.float32), places, rises)
        return p.at[-1].multiply(rise), p[-1] * (1 - rise)

    def likeness(outer_params, batch, alike):
        """What each window has of the share of what looks like the sample, `alike`, in shares."""
        found = jnp.where(looked_at[batch["domain"]], score(batch["tokens"]), _NEVER)
        slope = SLOPE * jnp.exp(outer_params["slope"])
        threshold = top(found, slope, jnp.maximum(alike * rate * len(found), 1.0))
        passed = jax.nn.sigmoid(slope * (found - threshold))
        return passed / passed.sum()

    def weights(outer_params, batch):
        domain = batch["domain"]
        own, alike = parts(outer_params, batch)
        late = (batch["progress"] >= released) & (released < 1)
        part = jnp.where(batch["part"] == late, 2.0, 0.0)  # one of two
        each = (own * proposal.sum() / proposal)[domain] * jnp.where(domain == count, part, 1.0)
        return each + alike * len(domain) * likeness(outer_params, batch, alike)

    def learned(outer_params, batch=None):
        assert batch is not None
        own, alike = parts(outer_params, batch)
        return own.at[batch["domain"]].add(alike * likeness(outer_params, batch, alike))

    init = lambda: {"shares": by_domain.init(), "slope": jnp.zeros(())}
    return bf.outer.DataMixture(init, weights, learned)
