"""A step that must leave no NaN behind keeps no second copy of x, z and their moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import bilevel_flax as bf

SIZE = 100_000
PROBLEM = bf.Problem(
    lambda z, x, batch: 0.5 * jnp.sum((z - x * batch) ** 2),
    lambda z, x, batch: 0.5 * jnp.sum((z - batch) ** 2) + 0.1 * jnp.sum(x**2),
)


def test_temporaries_are_the_directions_and_what_they_are_made_of():
    solver = bf.soba(PROBLEM, inner=optax.adam(0.1), outer=optax.adam(0.1))
    state = jax.eval_shape(solver.init, jnp.zeros(SIZE), jnp.zeros(SIZE))
    side = jax.ShapeDtypeStruct((SIZE,), float)
    step = jax.jit(solver.update, donate_argnums=0).lower(state, bf.Batch(side, side)).compile()
    # 7 with a choice between the old state and the new one after the step.
    assert step.memory_analysis().temp_size_in_bytes < 4.5 * 4 * SIZE
