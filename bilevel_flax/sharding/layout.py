"""Where the arrays of one run lie, and how they get there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevel_flax.base import Problem, PyTree, TrainState
from bilevel_flax.sharding.state import batch_spec, state_shardings


class Layout:
    """The mesh of a run, and the shardings of all that a `Loop` moves.

    It works alike in one process and in many: every process hands over (and reads) the whole of a
    host array or its own parts of it, and keeps the parts that its devices hold.

    Args:
        mesh: from `make_mesh`.
        rules: as for `state_shardings`.
        problem: tells the per-sample leaves of x.

    Attributes:
        mesh: the mesh.
        rules: the rules.
        problem: the problem.

    Example:
        >>> import jax, numpy as np
        >>> from bilevel_flax.sharding.mesh import make_mesh
        >>> layout = Layout(make_mesh("data=1", jax.devices()[:1]))
        >>> layout.place_batches({"image": np.zeros((10, 8, 3))}, np.array([4, 1]))["image"].shape
        (2, 8, 3)
    """

    def __init__(self, mesh: Mesh, rules: Any = None, problem: Problem | None = None):
        self.mesh, self.rules, self.problem = mesh, rules, problem
        self.everywhere = NamedSharding(mesh, PartitionSpec())

    def state(self, state: TrainState) -> TrainState:
        """A `TrainState` of shardings, from a state or its shapes."""
        return state_shardings(state, self.mesh, self.rules, self.problem)

    def place_state(self, state: TrainState) -> TrainState:
        """The state on the mesh; in many processes each must hand over the same one.

        The state that was handed over may share buffers with the new one: do not use it again.
        """
        return jax.tree.map(place, state, self.state(state))

    def constrained(self, state: TrainState) -> TrainState:
        """The same state, held in its place inside a jitted function."""
        return jax.lax.with_sharding_constraint(state, self.state(state))

    def batches(self, tree: PyTree, leading: int = 1, name: str = "a minibatch") -> PyTree:
        """The shardings of minibatches [..., batch, ...] with `leading` axes before `batch`.

        Raises:
            ValueError: the devices do not divide the number of examples; names the leaf.
        """

        def sharding(path, leaf):
            full = name + jax.tree_util.keystr(path)
            return NamedSharding(self.mesh, batch_spec(full, leaf.shape, self.mesh, leading))

        return jax.tree.map_with_path(sharding, tree)

    def place_batches(self, tree: PyTree, ids: Any = None) -> PyTree:
        """Minibatches of the host on the mesh; a process reads only the examples it feeds.

        Args:
            tree: NumPy leaves [num_batches, batch, ...].
            ids: int `[*S]`: which of them, leaves `[*S, batch, ...]`; None: all.
        """
        leading = 1 if ids is None else np.ndim(ids)

        def put(leaf):
            shape = leaf.shape if ids is None else (*np.shape(ids), *leaf.shape[1:])
            spec = batch_spec("a minibatch", shape, self.mesh, leading)

            def read(index):
                if ids is None:
                    return leaf[index]
                # The examples are cut first: a view, of which a few minibatches are copied out.
                return leaf[(slice(None), *index[leading:])][ids[index[:leading]]]

            return jax.make_array_from_callback(shape, NamedSharding(self.mesh, spec), read)

        return jax.tree.map(put, tree)

    def place_everywhere(self, tree: PyTree) -> PyTree:
        """Host arrays, the same in all processes, on every device."""
        return jax.tree.map(lambda leaf: place(leaf, self.everywhere), tree)


def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array under a sharding whose devices may belong to other processes, too."""
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        inner = place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(inner, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
