"""The sharding that an NNX module's variables carry, in the tree of z."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec

from bilevel_flax.base import PyTree
from bilevel_flax.nnx.modules import check_model, paths, plain, value_of


def partition_specs(model: nnx.Module, *, wrt: Any = nnx.Param) -> PyTree:
    """A PartitionSpec for each leaf of z, from the metadata of the module's variables.

    Args:
        model: a module made with `nnx.with_partitioning` (or Params with sharding metadata); it
            may be abstract (`nnx.eval_shape`).
        wrt: as given to `problem`.

    Returns:
        z's tree of PartitionSpecs, for the `rules` of `bf.sharding`; variables without metadata
        are not cut.

    Raises:
        TypeError: `model` is no `nnx.Module`.
        ValueError: there is nothing to learn in `model`.

    Example:
        >>> import jax, bilevel_flax as bf
        >>> init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "fsdp"))
        >>> mesh = bf.sharding.make_mesh("data=1", jax.devices()[:1])
        >>> with jax.set_mesh(mesh):  # Flax wants to know the axes
        ...     model = nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))
        >>> bf.nnx.partition_specs(model)["kernel"]
        P(None, 'fsdp')
    """
    check_model(model, wrt)
    state = nnx.state(model, wrt)
    specs = paths(nnx.get_partition_spec(state))
    flat = []
    for path in paths(state):
        spec = value_of(specs[path])
        spec = spec if isinstance(spec, PartitionSpec) else PartitionSpec()
        flat.append((path, spec))
    return plain(nnx.from_flat_state(flat))
