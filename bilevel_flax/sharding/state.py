"""Where every array of a run lies on a mesh: the whole `TrainState`, and minibatches."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Problem, PyTree
from bilevel_flax.sharding.mesh import BATCH_AXES, batch_share
from bilevel_flax.sharding.rules import param_specs, path_name

_log = logging.getLogger(__name__)

# Fields of states that hold something in x's tree; whatever else is in z's.
_OUTER_FIELDS = {"outer", "cross_jvp", "outer_grad_outer", "per_sample"}
_HOST = "pinned_host"


def state_specs(state: Any, mesh: Mesh, rules: Any = None, problem: Any = None) -> Any:
    """A PartitionSpec for each leaf of a state; see `state_shardings`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.zeros((2048, 2)), jnp.zeros(()))
        >>> mesh = bf.sharding.make_mesh("fsdp=1", devices=jax.devices()[:1])
        >>> tuple(bf.sharding.state_specs(state, mesh, problem=problem).step)
        ()
    """
    z = {
        path: (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree.leaves_with_path(state.inner_params),
            jax.tree.leaves(param_specs(state.inner_params, mesh, rules)),
            strict=True,
        )
    }
    by_sample = _per_sample_leaves(state.outer_params, mesh, problem)

    def like_inner(path, leaf):
        """Z's specification where the path ends as one of z's and the shape is the same."""
        for length in range(len(path), -1, -1):
            known = z.get(path[len(path) - length :])
            if known is None:
                continue
            shape, spec = known
            if leaf.shape == shape:
                return spec
            if leaf.shape[1:] == shape:  # a table: one row for each minibatch
                return PartitionSpec(None, *spec)
        return None

    def like_outer(path, leaf):
        """One row for each sample, where the path leads through a per-sample leaf of x."""
        for part, (count, spec) in by_sample.items():
            inside = any(
                path[at : at + len(part)] == part for at in range(len(path) - len(part) + 1)
            )
            if inside and leaf.ndim and leaf.shape[0] == count:
                return spec
        return None

    def specs_of(tree, of_outer):
        def spec(path, leaf):
            fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
            outer = of_outer or bool(fields and fields[-1] in _OUTER_FIELDS)
            wanted = like_outer(path, leaf) if outer else like_inner(path, leaf)
            return PartitionSpec() if wanted is None else wanted

        return jax.tree.map_with_path(spec, tree)

    def specs(name):
        tree = getattr(state, name)
        if name in ("step", "model_state", "rng"):
            return jax.tree.map(lambda _: PartitionSpec(), tree)
        return specs_of(tree, name.startswith("outer_"))

    names = [field.name for field in dataclasses.fields(state)]
    return state.replace(**{name: specs(name) for name in names})


@functools.cache  # once a run, not at each of the places that ask
def _say_replicated(name: str, count: int, devices: int) -> None:
    _log.warning(
        "outer_params/%s has %d rows, which %d devices do not divide: each device keeps them all",
        name,
        count,
        devices,
    )


def _per_sample_leaves(outer_params: PyTree, mesh: Mesh, problem: Problem | None) -> dict:
    """Path -> (rows, specification) of the per-sample leaves of x."""
    declared = None if problem is None else problem.per_sample
    flags = rows.map_prefix(declared, lambda _: True, lambda _: False, outer_params)
    by_path = {}
    for (path, leaf), flag in zip(
        jax.tree.leaves_with_path(outer_params), jax.tree.leaves(flags), strict=True
    ):
        if not flag:
            continue
        spec = PartitionSpec(tuple(mesh.axis_names))
        if leaf.shape[0] % mesh.size:
            _say_replicated(path_name(path), leaf.shape[0], mesh.size)
            spec = PartitionSpec()
        by_path[path] = (leaf.shape[0], spec)
    return by_path


def state_shardings(
    state: Any, mesh: Mesh, rules: Any = None, problem: Problem | None = None
) -> Any:
    """Where each leaf of a state lies.

    z by the rules; v, the optimisers' states and the estimator's memory as the leaf of z that
    their path ends in (tables: each row so); per-sample leaves of x, their moments and their
    memory over all devices, if these divide the number of rows; all else on every device.

    Args:
        state: a state (that of `bf.directions`, too), or its shapes
            (`jax.eval_shape(solver.init, z, x)`).
        mesh: from `make_mesh`, or a host's own.
        rules: as for `rules.param_specs`; a host hands over its z's NamedShardings,
            `jax.tree.map(lambda leaf: leaf.sharding, z)`.
        problem: tells the per-sample leaves of x; None: there are none.

    Returns:
        A state of NamedShardings, for `jax.jit(..., in_shardings=, out_shardings=)`.

    Raises:
        ValueError: as `rules.param_specs`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: ((z - x) ** 2).sum(), lambda z, x, b: z.sum())
        >>> solver = bf.soba(problem, inner=optax.adam(0.1), outer=optax.sgd(0.1))
        >>> state = jax.eval_shape(solver.init, jnp.zeros((32, 64)), jnp.zeros(()))
        >>> mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
        >>> shardings = state_shardings(state, mesh, None, problem)
        >>> shardings.adjoint.spec, shardings.adjoint_opt_state[0].nu.spec
        (P(None, 'fsdp'), P(None, 'fsdp'))
    """
    specs = state_specs(state, mesh, rules, problem)

    def sharding(leaf, spec):
        kind = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
        return NamedSharding(mesh, spec, memory_kind=_HOST if kind == _HOST else None)

    return jax.tree.map(sharding, state, specs)


def batch_spec(name: str, shape: tuple[int, ...], mesh: Mesh, leading: int = 0) -> PartitionSpec:
    """Examples over data and fsdp; an array without an axis of examples on every device.

    Raises:
        ValueError: the devices do not divide the number of examples.
    """
    if len(shape) <= leading:
        return PartitionSpec()
    share = batch_share(mesh)
    if shape[leading] % share:
        raise ValueError(
            f"{name} holds {shape[leading]} examples in a minibatch, which the {share} devices "
            f"along data and fsdp do not divide: make the batch size a multiple of {share}"
        )
    return PartitionSpec(*(None,) * leading, BATCH_AXES)


def batch_shardings(batch: Any, mesh: Mesh, leading: int = 0) -> Any:
    """Where minibatches lie: their examples over data and fsdp, ids on every device.

    Args:
        batch: a `Batch`, or the data of one side; arrays or shapes.
        mesh: from `make_mesh`.
        leading: axes before that of the examples: 1 for leaves [N, batch, ...], or for solvers
            that take several minibatches a step.

    Returns:
        The same tree of NamedShardings.

    Raises:
        ValueError: the devices do not divide the number of examples; names the leaf.

    Example:
        >>> import jax, numpy as np, bilevel_flax as bf
        >>> mesh = bf.sharding.make_mesh("data=1", devices=jax.devices()[:1])
        >>> tuple(bf.sharding.batch_shardings({"x": np.zeros((8, 3))}, mesh)["x"].spec)
        (('data', 'fsdp'),)
    """

    def side(tree, name):
        def sharding(path, leaf):
            full = "/".join(part for part in (name, path_name(path)) if part)
            return NamedSharding(mesh, batch_spec(full, leaf.shape, mesh, leading))

        return jax.tree.map_with_path(sharding, tree)

    if not isinstance(batch, Batch):
        return side(batch, "batch")
    everywhere = lambda node: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), node)
    return Batch(
        side(batch.inner, "batch.inner"),
        side(batch.outer, "batch.outer"),
        everywhere(batch.inner_id),
        everywhere(batch.outer_id),
    )
