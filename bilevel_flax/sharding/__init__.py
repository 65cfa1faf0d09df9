"""One state on many devices: a mesh, rules, and shardings of the whole `TrainState`.

    mesh = bf.sharding.make_mesh("data=2,fsdp=4")
    state = jax.eval_shape(solver.init, inner_params, outer_params)
    shardings = bf.sharding.state_shardings(state, mesh, rules, problem)

v, both optimisers' states and the estimator's tables follow z; per-sample weights are spread over
all devices; scalars are replicated. `AXES` are the axes that a mesh may have, `BATCH_AXES` those
that examples are spread over.
"""

from bilevel_flax.sharding.data_parallel import data_parallel
from bilevel_flax.sharding.decomposition import decomposition
from bilevel_flax.sharding.layout import Layout
from bilevel_flax.sharding.mesh import AXES, BATCH_AXES, batch_share, make_mesh, mesh_shape
from bilevel_flax.sharding.named_axes import whole
from bilevel_flax.sharding.rules import param_specs
from bilevel_flax.sharding.state import batch_shardings, state_shardings, state_specs

__all__ = [
    "AXES",
    "BATCH_AXES",
    "Layout",
    "batch_share",
    "batch_shardings",
    "data_parallel",
    "decomposition",
    "make_mesh",
    "mesh_shape",
    "param_specs",
    "state_shardings",
    "state_specs",
    "whole",
]
