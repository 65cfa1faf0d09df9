"""Tunix: a `PeftTrainer` whose step is a solver's; LoRA parameters alone are z.

Needs `pip install google-tunix`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from tunix.sft import peft_trainer

from bilevel_flax.base import Batch, BilevelSolver, Info, PyTree
from bilevel_flax.trainers import nnx as bilevel_nnx
from bilevel_flax.trainers.optimizer import solver_optimizer


class PeftTrainer(peft_trainer.PeftTrainer):
    """Tunix's trainer on pairs of minibatches (`trainers.pairs`).

    v, x and the moments are its optimiser's variables: Tunix saves, restores and shards them. The
    last step's `Info` is `trainer.info`, and its outer loss is logged beside Tunix's metrics.

    Args:
        model: the module. Where it has `nnx.LoRAParam`s they are z, otherwise all Params are.
        solver: of `bf.nnx.problem(inner_loss, outer_loss, model, x, wrt=nnx.LoRAParam)`; its losses
            see what `with_gen_model_input_fn` makes of a minibatch.
        outer_params: x.
        training_config: Tunix's, without `gradient_accumulation_steps`.
        rng: key of the run; None: a fixed one.
        **settings: as Tunix's trainer.

    Raises:
        ValueError: gradients are to be accumulated.
    """

    def __init__(
        self,
        model: nnx.Module,
        solver: BilevelSolver,
        outer_params: PyTree,
        training_config: Any,
        *,
        rng: jax.Array | None = None,
        **settings: Any,
    ):
        if training_config.gradient_accumulation_steps is not None:
            raise ValueError(
                "gradient_accumulation_steps="
                f"{training_config.gradient_accumulation_steps} would add up gradients that a "
                "solver does not take: leave it out, and give the solver "
                "bf.oracles.microbatched(problem, k)"
            )
        self.info: Info | None = None
        tx = solver_optimizer(solver, outer_params, rng=rng)
        super().__init__(model, tx, training_config, **settings)

    @property
    def outer_params(self) -> PyTree:
        """X as it is."""
        return nnx.as_pure(self.optimizer.opt_state.outer_params)

    def create_train_step_fn(self):
        """Tunix's step: `(model, optimizer, pair) -> (loss, Info, norm of D_z)`."""

        def train_step(model: nnx.Module, optimizer: nnx.Optimizer, inputs: Any):
            sides = (self.gen_model_input_fn(inputs[side]) for side in ("inner", "outer"))
            info = bilevel_nnx.update(model, optimizer, Batch(*sides))
            return info.inner_loss, info, info.norms.inner

        return train_step

    def _post_process_train_step(self, aux: Info) -> None:
        self.info = aux
        metrics = self._buffered_train_metrics.additional_metrics  # as Tunix's own trainers do
        metrics.setdefault("outer_loss", ([], np.mean))[0].append(aux.outer_loss)
