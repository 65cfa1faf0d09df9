"""Levanter's own trainer and checkpoints, part of an Equinox tree as z, a mixture learned."""

from __future__ import annotations

import importlib.metadata
import runpy
from datetime import timedelta
from pathlib import Path

import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.trainers import pairs

NEEDS = "needs levanter: make test-trainers"
trainer_module = pytest.importorskip("levanter.trainer", reason=NEEDS)
eqx = pytest.importorskip("equinox", reason=NEEDS)
hax = pytest.importorskip("haliax", reason=NEEDS)

VOCAB, EMBED = hax.Axis("vocab", lm.VOCABULARY), hax.Axis("embed", 16)


class Model(eqx.Module):
    base: hax.NamedArray  # frozen
    embed: hax.NamedArray
    name: str = eqx.field(static=True)

    @staticmethod
    def init(key):
        keys = jax.random.split(key)
        draw = lambda k: hax.random.normal(k, (EMBED, VOCAB)) * 0.3
        return Model(draw(keys[0]), draw(keys[1]), "tiny")

    def losses(self, batch):
        tokens = batch["tokens"]
        logits = self.embed.array.T[tokens[:, :-1]] @ self.base.array
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers")  # Levanter's own
TRAINABLE = Model(False, True, "tiny")


def solver_for(model):
    from bilevel_flax.trainers import levanter

    problem = levanter.problem(
        lambda m, x, batch, key: (lm.MIXTURE.weights(x, batch) * m.losses(batch)).mean(),
        lambda m, x, batch, key: hax.named(m.losses(batch), "batch").mean(),
        model,
        is_trainable=TRAINABLE,
    )
    tx = {"inner": optax.adam(0.05), "adjoint": optax.sgd(0.1), "outer": optax.sgd(0.5)}
    return bf.soba(problem, **tx), problem


def config_of(steps, folder):
    from levanter.checkpoint import CheckpointerConfig
    from levanter.distributed import DistributedConfig, RayConfig
    from levanter.tracker import NoopConfig

    config = trainer_module.TrainerConfig(
        id="run",
        num_train_steps=steps,
        train_batch_size=lm.BATCH,
        tracker=NoopConfig(),
        log_dir=folder / "logs",
        log_jaxprs=False,
        log_xla_hlo=False,
        require_accelerator=False,
        ray=RayConfig(auto_start_cluster=False),
        distributed=DistributedConfig(initialize_jax_distributed=False),
        checkpointer=CheckpointerConfig(
            base_path=str(folder / "checkpoints"), save_interval=timedelta(days=1), keep=[]
        ),
    )
    config.initialize()
    return config


def trained(model, steps, folder, skip=0):
    from bilevel_flax.trainers.levanter import Trainer

    solver, _ = solver_for(model)
    stream = pairs(*lm.streams())
    for _ in range(skip):
        next(stream)
    with Trainer(config_of(steps, folder), solver, lm.MIXTURE.init()) as levanter_trainer:
        state = levanter_trainer.initial_state(
            jax.random.PRNGKey(0), model=model, is_trainable=TRAINABLE
        )
        assert int(state.step) == skip
        info = levanter_trainer.train(state, stream)
        saver = levanter_trainer.config.checkpointer.create("run")
        saver.on_step(info, force=True)  # as Levanter's own programs do at the end
        saver.wait_until_finished()
    return info.state


def test_the_private_names_that_the_adapter_replaces_are_there():
    """As of levanter 1.2.dev1644, which has no public name for what is compiled of a step."""
    names = {"_train_step", "_jit_train_step_fn", "_jit_train_step_fn_no_hook"}
    missing = names - set(vars(trainer_module.Trainer))
    assert not missing, importlib.metadata.version("levanter")


def test_the_compiled_step_is_that_of_named_jit_and_is_traced_once():
    from bilevel_flax.trainers.levanter_jit import StateJit

    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    embed, mapping, traced = hax.Axis("embed", 2 * jax.device_count()), {"embed": "data"}, []

    def step(state, inputs, options):
        traced.append(hax.partitioning.current_thread_local_mapping())
        named, plain = state["named"] + inputs * options["by"], state["plain"] + 1
        assert isinstance(state["rate"], float)
        return {**state, "named": named, "plain": plain}, state["activation"](plain)

    def three_steps(compiled):
        state = {"named": hax.zeros(embed), "plain": jnp.zeros((8, 2))}
        state |= {"activation": jnp.tanh, "rate": 0.5}
        result = None
        for i in range(3):
            donated = state["plain"]
            state, result = compiled(state, np.full((), i, np.float32), {"by": 2.0})
        assert donated.is_deleted()
        return state, result

    with hax.partitioning.set_mesh(mesh):
        theirs = hax.named_jit(step, mapping, donate_args=(True,))
        expected = three_steps(theirs)
        traced.clear()
        compiled = StateJit(step, mapping)
        actual = three_steps(compiled)
        assert traced == [mapping]
        arguments = actual[0], np.float32(1), {"by": 2.0}  # Levanter logs both texts
        assert " tanh " in str(eqx.filter_make_jaxpr(compiled)(*arguments)[0])
        assert "stablehlo.tanh" in compiled.lower(*arguments).as_text("stablehlo")
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert (actual[0]["activation"], actual[0]["rate"]) == (jnp.tanh, 0.5)
    arrays = [jax.tree.leaves(eqx.filter(run, eqx.is_array)) for run in (actual, expected)]
    for ours, named in zip(*arrays, strict=True):
        np.testing.assert_array_equal(ours, named)
        assert ours.sharding.is_equivalent_to(named.sharding, ours.ndim)
    assert not actual[0]["named"].array.sharding.is_fully_replicated or jax.device_count() == 1


def test_fifty_steps_are_ours_and_a_resumed_run_is_an_uninterrupted_one(tmp_path):
    model = Model.init(jax.random.PRNGKey(0))
    solver, problem = solver_for(model)
    z, rest = (eqx.filter(model, keep) for keep in (TRAINABLE, Model(True, False, "tiny")))
    state = solver.init(z, lm.MIXTURE.init(), model_state=rest)
    update = jax.jit(solver.update)
    for _, pair in zip(range(lm.STEPS), pairs(*lm.streams()), strict=False):
        batch = jax.tree.map(jnp.asarray, pair)
        state, _ = update(state, bf.Batch(batch["inner"], batch["outer"]))

    whole = trained(model, lm.STEPS, tmp_path / "whole")
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    close(whole.model.embed.array, state.inner_params.embed.array)
    close(whole.opt_state.outer_params, state.outer_params)
    close(whole.opt_state.adjoint.embed.array, state.adjoint.embed.array)
    np.testing.assert_array_equal(whole.model.base.array, model.base.array)
    assert lm.MIXTURE.shares(whole.opt_state.outer_params)[0] > 0.6

    trained(model, lm.STEPS // 2, tmp_path / "run")
    resumed = trained(model, lm.STEPS, tmp_path / "run", skip=lm.STEPS // 2)
    close(resumed.model.embed.array, state.inner_params.embed.array)
    close(resumed.opt_state.outer_params, state.outer_params)


def test_accumulation_is_refused(tmp_path):
    import dataclasses

    from bilevel_flax.trainers.levanter import Trainer

    config = dataclasses.replace(config_of(1, tmp_path), train_batch_size=2 * lm.BATCH)
    solver, _ = solver_for(Model.init(jax.random.PRNGKey(0)))
    with pytest.raises(ValueError, match="per_device_parallelism=1 would add up gradients"):
        Trainer(config, solver, lm.MIXTURE.init())


def test_its_mixture_reads_what_was_learned(tmp_path):
    import asyncio
    import json

    from levanter.data.dataset import ListAsyncDataset
    from levanter.data.mixture import MixtureDataset

    mixture = pytest.importorskip("bilevel_flax.train.mixture", reason="needs the extra [train]")
    rows = [{"step": 0, "mixture/a": 0.5, "mixture/b": 0.5}]
    rows += [{"step": 100, "mixture/a": 0.1, "mixture/b": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"steps": 100, "batch_size": 8, "length": 6}))
    (tmp_path / "summary.json").write_text(json.dumps({"mixture": {"a": 0.1, "b": 0.9}}))
    out = tmp_path / "mix.json"
    mixture.export(mixture.Options(tmp_path, "levanter", out, stages=4, block_size=100))
    data = json.loads(out.read_text())["data"]
    stages = [(start, weights) for start, weights in data["train_weights"]]
    assert [start for start, _ in stages] == [0, 200, 400, 600]
    parts = {name: ListAsyncDataset([name] * 10, is_complete=True) for name in "ab"}
    read = MixtureDataset(parts, stages, data["mixture_block_size"], key=0)
    drawn = asyncio.run(read.get_batch(range(800)))
    for i, (_, weights) in enumerate(stages):
        count = drawn[200 * i : 200 * (i + 1)].count("a")
        assert count / 200 == pytest.approx(weights["a"], abs=0.01)


def test_the_script_of_few_lines_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(__file__).parent / "scripts"
    for when in ("before", "after"):
        after = runpy.run_path(str(folder / f"levanter_{when}.py"))
    assert lm.MIXTURE.shares(after["state"].opt_state.outer_params)[0] > 0.5
