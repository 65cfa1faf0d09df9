"""What comes back from a checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns.

    Attributes:
        state: with structure, dtypes and shardings of the template.
        meta: as handed to `save`, after a round trip through JSON.
        step: the step.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state, directory = solver.init(jnp.array(0.5), jnp.array(2.0)), tempfile.mkdtemp()
        >>> with bf.checkpoints.Checkpointer(directory) as checkpointer:
        ...     checkpointer.save(3, state, {"epoch": 1})
        >>> with bf.checkpoints.Checkpointer(directory) as checkpointer:
        ...     restored = checkpointer.restore(state)
        >>> restored.step, restored.meta["epoch"], float(restored.state.outer_params)
        (3, 1, 2.0)
    """

    state: Any
    meta: dict[str, Any]
    step: int
