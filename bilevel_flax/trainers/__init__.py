"""A solver inside a trainer that somebody else wrote: docs/trainers.md.

`solver_optimizer` puts a solver where a trainer wants an Optax optimiser, so that the trainer
checkpoints, shards and donates v, x and all moments as it does any optimiser's state. `flax` and
`nnx` step states of these; `tunix`, `kauldron` and `levanter` are each imported with the package of
that name, which is no dependency of this one.
"""

from bilevel_flax.trainers.batches import pairs
from bilevel_flax.trainers.optimizer import (
    SolverOptimizer,
    SolverState,
    solver_optimizer,
    train_step,
)

__all__ = ["SolverOptimizer", "SolverState", "pairs", "solver_optimizer", "train_step"]
