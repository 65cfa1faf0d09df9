"""NNX modules in, modules out: losses that take `flax.nnx` modules, and an optimiser for them.

The solvers know pytrees of arrays only. So a module is split: z is a plain dict of its Params,
BatchNorm's statistics and all other variables become the model state, and dropout's streams are
seeded anew in every step from the solver's own key, so that a checkpoint of the `TrainState` holds
everything. Inside the loss the module is put together again, a fresh copy in each evaluation: the
gradient and the Hessian-vector product see one draw of dropout, and BatchNorm moves once a step.
A Param in two places is one leaf of z.

Reference:
    Flax NNX, https://flax.readthedocs.io (the functional API: split, merge, state).
"""

from bilevel_flax.nnx.losses import problem
from bilevel_flax.nnx.optimizer import Optimizer, OptimizerArray, OuterParam
from bilevel_flax.nnx.specs import partition_specs
from bilevel_flax.nnx.state import init, params, write

__all__ = [
    "Optimizer",
    "OptimizerArray",
    "OuterParam",
    "init",
    "params",
    "partition_specs",
    "problem",
    "write",
]
