"""Kauldron's own trainer, losses, metrics and checkpoints, with a mixture learned beside."""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import runpy
from pathlib import Path

import jax
import lm
import numpy as np
import optax
import pytest
from flax import linen as nn

import bilevel_flax as bf

kd = pytest.importorskip("kauldron.kd", reason="needs kauldron: make test-trainers")


class Model(nn.Module):
    tokens: kd.kontext.Key = "batch.tokens"

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(lm.VOCABULARY, 16)(tokens[:, :-1])
        return nn.Dense(lm.VOCABULARY)(x)


def losses(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


class Nats(kd.losses.Loss):
    logits: kd.kontext.Key = "preds"
    tokens: kd.kontext.Key = "batch.tokens"

    def get_values(self, logits, tokens):
        return losses(logits, tokens)


def inner_loss(context, x):
    weights = lm.MIXTURE.weights(x, context.batch)
    return (weights * losses(context.preds, context.batch["tokens"])).mean()


class Source:
    """Training examples, each with one of the target's."""

    def __init__(self):
        inner, outer = lm.streams()
        batches = [{**next(inner), "outer": next(outer)} for _ in range(lm.STEPS)]
        self.rows = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

    def __len__(self):
        return lm.STEPS * lm.BATCH

    def __getitem__(self, i):
        return jax.tree.map(lambda leaf: leaf[i], self.rows)


REPORTED = ("inner_loss", "outer_loss", "norms.outer")
SOLVER = functools.partial(bf.soba, adjoint=optax.sgd(0.1), outer=optax.sgd(0.5))


def trainer(folder, steps):
    from bilevel_flax.trainers.kauldron import TrainStep

    return kd.train.Trainer(
        seed=0,
        workdir=folder,
        train_ds=kd.data.py.DataSource(
            data_source=Source(), batch_size=lm.BATCH, shuffle=False, num_epochs=1, num_workers=0
        ),
        model=Model(),
        num_train_steps=lm.STEPS,
        stop_after_steps=steps,
        log_metrics_every=10,
        train_losses={"nats": Nats()},
        train_metrics={
            key: kd.metrics.SingleDimension(tensor=f"info.{key}", index=None) for key in REPORTED
        },
        optimizer=optax.adam(0.05),
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=25),
        trainstep=TrainStep(solver=SOLVER, outer_params=lm.MIXTURE.init(), inner_loss=inner_loss),
    )


def test_the_private_names_that_the_adapter_replaces_are_there():
    """As of kauldron 1.4.4: `TrainStep` has no public name for a step that is compiled."""
    missing = {"_step", "_init_optimizer"} - set(vars(kd.train.TrainStep))
    assert not missing, importlib.metadata.version("kauldron")


def test_fifty_steps_are_ours_and_a_resumed_run_is_an_uninterrupted_one(tmp_path):
    whole, _ = trainer(tmp_path / "whole", lm.STEPS).train()

    def of(z, batch):
        return losses(Model().apply({"params": z}, batch["tokens"]), batch["tokens"])

    problem = bf.Problem(
        lambda z, x, batch: (lm.MIXTURE.weights(x, batch) * of(z, batch)).mean(),
        lambda z, x, batch: of(z, batch).mean(),
    )
    solver = SOLVER(problem, inner=optax.adam(0.05))
    run = trainer(tmp_path / "start", lm.STEPS)
    start = run.trainstep.init(run.train_ds.element_spec)
    state = solver.init(start.params, lm.MIXTURE.init())
    update = jax.jit(solver.update)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for i, batch in enumerate(run.train_ds):
        state, info = update(state, bf.Batch(batch, batch["outer"]))
        if i == 0:
            _, reported = run.trainstep.step(start, batch, return_metrics=True)
            for key in REPORTED:
                expected = operator.attrgetter(key)(info)
                close(reported.metric_states[key].compute(), expected)

    jax.tree.map(close, whole.params, state.inner_params)
    close(whole.opt_state.outer_params, state.outer_params)
    jax.tree.map(close, whole.opt_state.adjoint, state.adjoint)
    assert lm.MIXTURE.shares(whole.opt_state.outer_params)[0] > 0.6

    trainer(tmp_path / "run", lm.STEPS // 2 + 1).train()
    again = trainer(tmp_path / "run", lm.STEPS)
    assert again.checkpointer.latest_step == lm.STEPS // 2
    resumed, _ = again.train()
    jax.tree.map(close, resumed.params, state.inner_params)
    close(resumed.opt_state.outer_params, state.outer_params)


def test_a_batch_without_an_outer_side_is_refused(tmp_path):
    run = trainer(tmp_path, 1)
    state = run.trainstep.init(run.train_ds.element_spec)
    batch = next(iter(run.train_ds))
    with pytest.raises(ValueError, match=r"\['domain', 'tokens'\] and no \"outer\""):
        run.trainstep.step(state, {k: v for k, v in batch.items() if k != "outer"})


def test_the_script_of_few_lines_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(__file__).parent / "scripts"
    for when in ("before", "after"):
        after = runpy.run_path(str(folder / f"kauldron_{when}.py"))
    assert lm.MIXTURE.shares(after["state"].opt_state.outer_params)[0] > 0.5
