"""Tunix's own trainer, data stream and checkpoints, with a mixture learned beside."""

from __future__ import annotations

import importlib.metadata
import runpy
from pathlib import Path

import jax
import lm
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel_flax as bf
from bilevel_flax.trainers import pairs

peft = pytest.importorskip(
    "tunix.sft.peft_trainer", reason="needs google-tunix: make test-trainers"
)
ocp = pytest.importorskip("orbax.checkpoint")


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(lm.VOCABULARY, 16, rngs=rngs)
        base = nnx.Linear(16, lm.VOCABULARY, rngs=rngs)
        self.out = nnx.LoRA(16, 4, lm.VOCABULARY, base_module=base, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.embed(tokens))


def losses(model, batch):
    logits = model(batch["tokens"])[:, :-1]
    targets = batch["tokens"][:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(-1)


def solver_for(model):
    problem = bf.nnx.problem(
        lambda model, x, batch: (lm.MIXTURE.weights(x, batch) * losses(model, batch)).mean(),
        lambda model, x, batch: losses(model, batch).mean(),
        model,
        lm.MIXTURE.init(),
        wrt=nnx.LoRAParam,
    )
    return bf.soba(problem, inner=optax.adam(0.05), adjoint=optax.sgd(0.1), outer=optax.sgd(0.5))


def trainer(model, steps, folder=None):
    from bilevel_flax.trainers.tunix import PeftTrainer

    config = peft.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        checkpoint_root_directory=None if folder is None else str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=25),
    )
    return PeftTrainer(model, solver_for(model), lm.MIXTURE.init(), config)


def test_the_private_names_that_the_adapter_uses_are_there():
    """As of google-tunix 0.1.7, whose own `rl.trainer` hands on what a step reports in this way."""
    names = "_post_process_train_step", "_buffered_train_metrics"
    run = trainer(Model(nnx.Rngs(0)), 1)
    missing = [name for name in names if not hasattr(run, name)]
    assert not missing, importlib.metadata.version("google-tunix")
    assert "additional_metrics" in peft.MetricsBuffer.__dataclass_fields__


def test_fifty_steps_are_ours_and_a_resumed_run_is_an_uninterrupted_one(tmp_path):
    model = Model(nnx.Rngs(0))
    solver = solver_for(model)
    state = bf.nnx.init(solver, model, lm.MIXTURE.init(), wrt=nnx.LoRAParam)
    update = jax.jit(solver.update)
    outer_losses = []
    for _, pair in zip(range(lm.STEPS), pairs(*lm.streams()), strict=False):
        state, info = update(state, bf.Batch(pair["inner"], pair["outer"]))
        outer_losses.append(info.outer_loss)

    trained = trainer(model, lm.STEPS)
    trained.train(pairs(*lm.streams()))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, bf.nnx.params(model, wrt=nnx.LoRAParam), state.inner_params)
    close(trained.outer_params, state.outer_params)
    jax.tree.map(close, trained.info, info)
    logger, prefix = trained.metrics_logger, trained.metrics_prefix
    close(logger.get_metric_history(prefix, "outer_loss", "train"), outer_losses)
    assert lm.MIXTURE.shares(trained.outer_params)[0] > 0.6  # the target counts upwards

    half = Model(nnx.Rngs(0))
    trainer(half, lm.STEPS // 2, tmp_path / "run").train(pairs(*lm.streams()))
    again = Model(nnx.Rngs(0))
    resumed = trainer(again, lm.STEPS, tmp_path / "run")
    assert resumed.train_steps == lm.STEPS // 2
    resumed.train(pairs(*lm.streams()))
    jax.tree.map(close, bf.nnx.params(again, wrt=nnx.LoRAParam), state.inner_params)
    close(resumed.outer_params, state.outer_params)


def test_accumulation_is_refused():
    from bilevel_flax.trainers.tunix import PeftTrainer

    model = Model(nnx.Rngs(0))
    config = peft.TrainingConfig(eval_every_n_steps=9, max_steps=1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 would add up gradients"):
        PeftTrainer(model, solver_for(model), lm.MIXTURE.init(), config)


def test_the_script_of_few_lines_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(__file__).parent / "scripts"
    for when in ("before", "after"):
        after = runpy.run_path(str(folder / f"tunix_{when}.py"))
    assert lm.MIXTURE.shares(after["trainer"].outer_params)[0] > 0.5
