"""Training a derived network from scratch, in the package's loop for plain training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.workdir import read_json, write_json
from examples.darts import augment
from examples.darts.derived import DerivedNetwork
from examples.darts.genotype import Genotype, as_json
from examples.darts.images import Images, Part, all_training_images
from examples.darts.network import initial, make_stack
from examples.darts.optimizers import make_optimizer

_EVALUATED = 500  # images at once
_RAMP = 20  # times that drop-path's probability rises


class Trained(NamedTuple):
    """One seed.

    Attributes:
        seed: of initialisation and augmentation.
        test_error: in [0, 1].
        train_loss: mean over the last tenth of the run.
        parameters: numbers in the network, the auxiliary head left out.
        seconds: of CPU time, compilation left out.
    """

    seed: int
    test_error: float
    train_loss: float
    parameters: int
    seconds: float


def make_network(config: Any, genotype: Genotype, images: Images) -> DerivedNetwork:
    """The network that `config.retrain` describes.

    Raises:
        ConfigError: a number out of range, images too small.
    """
    chosen = config.retrain
    for name, fine, needs in (
        ("drop_path", 0 <= chosen.drop_path < 1, "must lie in [0, 1), a probability"),
        ("cutout", chosen.cutout >= 0, "must be 0 or more, pixels a side"),
        ("shift", chosen.shift >= 0, "must be 0 or more, pixels"),
        ("auxiliary", chosen.auxiliary >= 0, "must be 0 or more, a weight"),
        ("epochs", chosen.epochs > 0, "must be above 0"),
        ("batch_size", chosen.batch_size >= 1, "must be 1 or more"),
    ):
        if not fine:
            raise ConfigError(f"--config.retrain.{name}={chosen[name]}: {needs}")
    stack = make_stack(
        images.train.image.shape[1],
        chosen.width,
        chosen.cells,
        chosen.reductions,
        chosen.stem_stride,
        "config.retrain",
    )
    return DerivedNetwork(
        genotype, stack, images.num_classes, chosen.auxiliary > 0, config.network.as_matrix
    )


def shapes_of(network: DerivedNetwork, image_shape: tuple[int, ...]) -> Any:
    """Shapes of the network's variables, without computing any."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = lambda rng, images: network.init(rng, images, train=False)
    return jax.eval_shape(init, jax.random.key(0), images)


def count_parameters(network: DerivedNetwork, image_shape: tuple[int, ...]) -> int:
    """Numbers that the network learns; the auxiliary head, which is dropped, left out."""
    leaves = jax.tree.leaves_with_path(shapes_of(network, image_shape)["params"])
    return sum(leaf.size for path, leaf in leaves if not path[0].key.startswith("auxiliary"))


def make_problem(config: Any, network: DerivedNetwork) -> bf.Problem:
    """The loss of ordinary training, as G; x is drop-path's probability, which a run raises."""
    chosen = config.retrain

    def loss(z, x, batch, model_state, rng):
        keys = jax.random.split(rng, 4)
        images = batch["image"]
        if chosen.shift:
            images = augment.shifted(keys[0], images, chosen.shift)
        if chosen.mirror:
            images = augment.mirrored(keys[1], images)
        if chosen.cutout:
            images = augment.cut_out(keys[2], images, chosen.cutout)
        (logits, extra), new_state = network.apply(
            {"params": z, **model_state},
            images,
            x if chosen.drop_path else 0.0,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": keys[3]},
        )
        entropy = optax.softmax_cross_entropy_with_integer_labels
        losses = entropy(logits, batch["label"])
        if extra is not None:
            losses += chosen.auxiliary * entropy(extra, batch["label"])
        value = bf.masked_mean(losses, batch.get("mask"))
        return value, bf.Aux(model_state=dict(new_state))

    return bf.Problem(loss, loss, stateful=True)


class Trainer:
    """Trains one genotype with any number of seeds; the step is compiled once.

    Args:
        config: its `retrain` and `network.as_matrix`.
        genotype: the cells.
        images: trained on all but the test part.

    Raises:
        ConfigError: as `make_network`.
    """

    def __init__(self, config: Any, genotype: Genotype, images: Images):
        chosen = config.retrain
        self._network = make_network(config, genotype, images)
        self._chosen, self._test = chosen, images.test
        train = all_training_images(images)
        if chosen.examples is not None:
            train = Part(train.image[: chosen.examples], train.label[: chosen.examples])
        size = min(chosen.batch_size, len(train.label))
        parts = data.partition(train._asdict(), size, seed=0)
        self._shape = train.image.shape[1:]
        self._steps = max(1, round(chosen.epochs * parts.num_batches))
        optimizer = make_optimizer(
            chosen.learning_rate, self._steps, chosen.optimizer, chosen.weight_decay
        )
        self._solver = inner_only(
            make_problem(config, self._network),
            # One vector: with a few kernels for each of 150 leaves it compiles a quarter longer.
            inner=optax.flatten(optimizer),
            inner_weights=parts.weights if parts.ragged else None,
        )
        unread = data.partition({"nothing": np.zeros(1)}, 1)  # there is no outer loss
        self._loop = StepRunner(self._solver, parts, unread, seed=0)
        self._logits = jax.jit(lambda variables, x: self._network.apply(variables, x, train=False))

    @property
    def parameters(self) -> int:
        """See `count_parameters`."""
        return count_parameters(self._network, self._shape)

    def __call__(self, seed: int, say: Callable[[str], None]) -> Trained:
        """Trains from scratch and measures on test data, once.

        Raises:
            ConfigError: the training diverged.
        """
        rng, run_rng = jax.random.split(jax.random.key(seed))
        variables = jax.jit(lambda rng: initial(shapes_of(self._network, self._shape), rng))(rng)
        state = self._solver.init(
            variables["params"],
            jnp.zeros(()),
            model_state={"batch_stats": variables["batch_stats"]},
            rng=run_rng,
        )
        self._loop.rewind()
        step, losses = 0, []
        every = max(1, self._steps // _RAMP)
        while step < self._steps:
            # Drop-path's probability grows linearly over the run, as in the paper.
            now = self._chosen.drop_path * (step // every * every) / self._steps
            state = state.replace(outer_params=jnp.float32(now))
            stop = min(self._steps, step + every - step % every)
            state, info = self._loop.run(state, step, stop)
            if not info.finite.inner[-1]:
                raise ConfigError("training diverged: lower --config.retrain.learning_rate")
            step += len(info.inner_loss)
            losses += info.inner_loss.tolist()
        last = losses[-max(1, self._steps // 10) :]
        done = Trained(
            seed,
            self._error(state),
            float(np.mean(last)),
            self.parameters,
            self._loop.cpu_seconds,
        )
        say(f"seed {seed}: test error {100 * done.test_error:.2f} %, {done.seconds:.0f} CPU s")
        return done

    def _error(self, state: bf.TrainState) -> float:
        variables = {"params": state.inner_params, **state.model_state}
        images, labels = self._test
        padded = np.resize(images, (-(-len(labels) // _EVALUATED) * _EVALUATED, *images.shape[1:]))
        parts = np.split(padded, len(padded) // _EVALUATED)
        logits = np.concatenate([np.asarray(self._logits(variables, part)[0]) for part in parts])
        return float((logits[: len(labels)].argmax(-1) != labels).mean())

    def close(self) -> None:
        """Ends the loop."""
        self._loop.close()


def train_seeds(
    config: Any,
    genotype: Genotype,
    images: Images,
    seeds: int,
    path: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains with seeds 0 .. seeds - 1; what `path` holds already is not computed again.

    Returns:
        What the file holds: `genotype`, `settings`, `runs` (a dict for each seed), and over these
        `test_error` (mean), `test_error_spread` (standard deviation), `parameters`.

    Raises:
        ConfigError: the file is of another genotype or other settings.
    """
    settings = {**config.retrain.to_dict(), "data": config.data.name}
    settings["splits"] = settings.get("splits") or config.data.splits
    wanted = _plain({"genotype": as_json(genotype), "settings": settings})
    record = read_json(path) if path.exists() else {**wanted, "runs": []}
    for key, value in wanted.items():
        if record.get(key) != value:
            raise ConfigError(
                f"{path} holds results of another {key}: give another --workdir, or delete it"
            )
    trainer = None
    for seed in range(seeds):
        if any(run["seed"] == seed for run in record["runs"]):
            continue
        if trainer is None:
            trainer = Trainer(config, genotype, images)
            say(f"{trainer.parameters:,} parameters; compiling")
        record["runs"].append(trainer(seed, say)._asdict())
        write_json(path, {**record, **_summary(record["runs"])})
    if trainer is not None:
        trainer.close()
    return {**record, **_summary(record["runs"])}


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [run["test_error"] for run in runs]
    return {
        "test_error": float(np.mean(errors)),
        "test_error_spread": float(np.std(errors, ddof=1)) if len(errors) > 1 else 0.0,
        "parameters": runs[0]["parameters"],
    }
