"""What the adapters of other packages' trainers cost on top of the library's own loop.

    .trainers/kauldron/bin/python -m benchmarks.trainer_adapters kauldron [--steps 20] [--rounds 9]
    .trainers/tunix/bin/python -m benchmarks.trainer_adapters tunix
    .trainers/levanter/bin/python -m benchmarks.trainer_adapters levanter

In the environments that `make test-trainers` leaves. The model, the solver and the way of measuring
are those of `adapters.py`; a trainer's step is called as its own loop calls it, and what that loop
does besides (logs, hooks, data) is its own. Levanter's is among what is timed, as its `train_step`
waits for each loss, checks and logs it: a second row has what plain training with it takes on top
of `jax.jit`.
"""

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import bilevel_flax as bf
from benchmarks.adapters import MIXTURE, Linen, Modules, Run, nats, own_loop, report, solver_of
from benchmarks.rows import add_argument


def of_kauldron(batch: bf.Batch, folder: Path) -> tuple[Run, Run]:
    """Our loop, and Kauldron's `TrainStep`."""
    from kauldron import kd

    from bilevel_flax.trainers.kauldron import TrainStep

    class Model(nn.Module):
        tokens: kd.kontext.Key = "batch.tokens"

        @nn.compact
        def __call__(self, tokens):
            return Linen()(tokens[:, :-1])

    class Nats(kd.losses.Loss):
        logits: kd.kontext.Key = "preds"
        tokens: kd.kontext.Key = "batch.tokens"

        def get_values(self, logits, tokens):
            return nats(logits, tokens)

    class Source:
        def __len__(self):
            return len(batch.inner["tokens"])

        def __getitem__(self, i):
            row = lambda side: jax.tree.map(lambda leaf: np.asarray(leaf[i]), side)
            return {**row(batch.inner), "outer": row(batch.outer)}

    def inner_loss(context, x):
        weights = MIXTURE.weights(x, context.batch)
        return (weights * nats(context.preds, context.batch["tokens"])).mean()

    data = kd.data.py.DataSource(
        data_source=Source(), batch_size=len(Source()), shuffle=False, num_epochs=1, num_workers=0
    )
    trainer = kd.train.Trainer(
        seed=0,
        workdir=folder,
        train_ds=data,
        model=Model(),
        num_train_steps=1,
        train_losses={"nats": Nats()},
        optimizer=optax.adam(1e-3),
        trainstep=TrainStep(
            solver=functools.partial(bf.auto, steps=100_000),
            outer_params=MIXTURE.init(),
            inner_loss=inner_loss,
        ),
    )
    losses = lambda z, side: nats(Model().apply({"params": z}, side["tokens"]), side["tokens"])
    solver = solver_of(of_weights(losses))
    start = lambda: trainer.trainstep.init(trainer.train_ds.element_spec)
    state, minibatch = start(), {**batch.inner, "outer": batch.outer}

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, _ = trainer.trainstep.step(state, minibatch)
        jax.block_until_ready(state.params)

    return own_loop(solver, solver.init(start().params, MIXTURE.init()), batch), run


def of_tunix(batch: bf.Batch, folder: Path) -> tuple[Run, Run]:
    """Our loop on the module's arrays, and Tunix's jitted step, its graph of variables cached."""
    from tunix.sft import peft_trainer

    from bilevel_flax.trainers.tunix import PeftTrainer

    model, x = Modules(nnx.Rngs(0)), MIXTURE.init()
    losses = lambda model, side: nats(model(side["tokens"][:, :-1]), side["tokens"])
    weighted = of_weights(losses)
    problem = bf.nnx.problem(weighted.inner_loss, weighted.outer_loss, model, x)
    solver = solver_of(problem)
    own = own_loop(solver, bf.nnx.init(solver, Modules(nnx.Rngs(0)), x), batch)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1)
    trainer = PeftTrainer(model, solver, x, config)
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    pair = {"inner": batch.inner, "outer": batch.outer}

    def run(steps):
        for _ in range(steps):
            loss, *_ = step(pair)
        jax.block_until_ready(loss)

    return own, run


def of_levanter(batch: bf.Batch, folder: Path) -> tuple[Run, Run]:
    """Our loop on an Equinox tree, and Levanter's `train_step`."""
    import equinox as eqx

    from bilevel_flax.trainers import levanter

    make = levanter_model(batch)
    weighted = of_weights(lambda model, side: model.losses(side["tokens"]))
    problem = levanter.problem(
        lambda model, x, side, key: weighted.inner_loss(model, x, side),
        lambda model, x, side, key: weighted.outer_loss(model, x, side),
        make(),
    )
    solver = solver_of(problem)
    rest = eqx.filter(make(), False)
    own = own_loop(solver, solver.init(make(), MIXTURE.init(), model_state=rest), batch)
    trainer = levanter.Trainer(levanter_config(batch, folder / "pairs"), solver, MIXTURE.init())
    return own, levanter_loop(trainer, make(), {"inner": batch.inner, "outer": batch.outer})


def of_levanter_alone(batch: bf.Batch, folder: Path) -> tuple[Run, Run]:
    """Plain training with Adam: `jax.jit` of a step, and the `train_step` of Levanter's trainer."""
    import haliax as hax
    from levanter.trainer import Trainer

    make, tx = levanter_model(batch), optax.adam(1e-3)
    tokens = hax.named(batch.inner["tokens"], ("batch", "position"))

    def loss(model, tokens, key=None):
        return hax.named(model.losses(tokens.array), "batch").mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        model, opt_state = state
        value, grads = jax.value_and_grad(lambda model: loss(model, tokens).array)(model)
        updates, opt_state = tx.update(grads, opt_state, model)
        return (optax.apply_updates(model, updates), opt_state), value

    state = make(), tx.init(make())

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, tokens)
        jax.block_until_ready(state)

    trainer = Trainer(levanter_config(batch, folder / "alone"), tx, loss)
    return run, levanter_loop(trainer, make(), tokens)


def levanter_model(batch: bf.Batch) -> Any:
    """A function that makes the model, an Equinox tree around Linen's parameters."""
    import equinox as eqx

    class Model(eqx.Module):
        params: Any

        def losses(self, tokens):
            return nats(Linen().apply({"params": self.params}, tokens[:, :-1]), tokens)

    return lambda: Model(Linen().init(jax.random.key(0), batch.inner["tokens"])["params"])


def levanter_config(batch: bf.Batch, folder: Path) -> Any:
    """Of a run that logs and saves nothing."""
    from levanter.checkpoint import CheckpointerConfig
    from levanter.distributed import DistributedConfig, RayConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import TrainerConfig

    config = TrainerConfig(
        id="run",
        num_train_steps=10**6,
        train_batch_size=len(batch.inner["tokens"]),
        tracker=NoopConfig(),
        log_dir=folder / "logs",
        log_jaxprs=False,
        log_xla_hlo=False,
        require_accelerator=False,
        ray=RayConfig(auto_start_cluster=False),
        distributed=DistributedConfig(initialize_jax_distributed=False),
        checkpointer=CheckpointerConfig(base_path=str(folder / "checkpoints"), keep=[]),
    )
    config.initialize()
    return config


def levanter_loop(trainer: Any, model: Any, minibatch: Any) -> Run:
    """Of a trainer's steps."""
    trainer.__enter__()
    state = trainer.initial_state(jax.random.PRNGKey(0), model=model)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state = trainer.train_step(state, minibatch).state
        jax.block_until_ready((state.model, state.opt_state))

    return run


def of_weights(losses: Any) -> bf.Problem:
    """`losses(z, side) -> [batch]`, weighted by domain in G, plain in F."""
    return bf.Problem(
        lambda z, x, side: (MIXTURE.weights(x, side) * losses(z, side)).mean(),
        lambda z, x, side: losses(z, side).mean(),
    )


LOOPS = {
    "kauldron": {"kauldron": of_kauldron},
    "tunix": {"tunix": of_tunix},
    "levanter": {"levanter": of_levanter, "no adapter: Levanter and Adam": of_levanter_alone},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=LOOPS)
    parser.add_argument("--steps", type=int, default=20, help="of a loop in a round")
    parser.add_argument("--rounds", type=int, default=9)
    add_argument(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            name: functools.partial(make, folder=Path(folder))
            for name, make in LOOPS[given.trainer].items()
        }
        report(loops, given)


if __name__ == "__main__":
    main()
