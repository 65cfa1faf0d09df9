"""The hypercleaning of MNIST on the bench, judged by its test error.

The published split (20,000 / 5,000 / 10,000 digits, linear model) with `--manual-dir`: seeds order
the minibatches only, as there. Without it 5,000 bundled digits, split and corrupted by the seed.
Steps are selected by the validation error.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax

from bilevel_flax.bench.tasks import BenchTask, Context, Measured, Optimizers, Setting
from bilevel_flax.distribution import shipped
from bilevel_flax.outer import normalized_sgd
from bilevel_flax.train import config as configs

# The share of training labels that are drawn anew.
CORRUPTION = {
    "mnist_hypercleaning": 0.5,
    "mnist_hypercleaning_p70": 0.7,
    "mnist_hypercleaning_p90": 0.9,
}
# ρ = 1 and ρ/γ = 1 lie inside the grid: the steps of configs/mnist_hypercleaning.py for SGD on
# standardised pixels, and for a normalised outer optimiser in units of a logit.
INNER_UNIT = 0.01
OUTER_UNIT = 0.5
PATIENCE_UNITS = 40_000.0
DEFAULT = (1.0, 1.0)

_HEADER = ("published, best of 63 pairs", "p = .5", "p = .7", "p = .9")
_PUBLISHED = (
    ("SABA", "13.6 %", "14.3 %", "17.1 %"),
    ("SOBA", "13.7 %", "14.5 %", "17.2 %"),
    ("AmIGO", "13.6 %", "14.7 %", "17.2 %"),
    ("FSLA", "14.7 %", "14.9 %", "17.7 %"),
    ("BSA", "14.2 %", "15.4 %", "18.0 %"),
    ("MRBO", "14.2 %", "15.6 %", "18.2 %"),
    ("SUSTAIN", "14.2 %", "15.6 %", "18.3 %"),
    ("TTSA", "16.0 %", "15.7 %", "18.7 %"),
    ("stocBiO", "14.6 %", "16.2 %", "20.7 %"),
)


def optimizers(setting: Setting) -> Optimizers:
    """SGD on z and v, normalised SGD on the logits; all steps decay, for test errors are noisy."""
    patience = PATIENCE_UNITS / setting.units
    rho = INNER_UNIT * setting.rho
    gamma = OUTER_UNIT * setting.rho / setting.ratio
    inner = optax.sgd(lambda t: rho / (1 + t / patience))
    outer = normalized_sgd(lambda t: gamma / (1 + t / patience))
    if not setting.sparse_outer:
        # The same arithmetic on dense directions.
        outer = optax.GradientTransformation(outer.init, outer.update)
    return Optimizers(inner, outer, adjoint_step=rho)


def make(name: str, context: Context) -> BenchTask:
    """The bench task.

    Raises:
        ConfigError: the example is not there.
        ValueError: missing or damaged data.
    """
    module = "examples.mnist_hypercleaning"
    make_task = configs.imported(f"{module}.task:make_task")
    config = configs.load(f"{shipped.root() / 'configs' / 'mnist_hypercleaning.py'}:soba")
    config.update({"seed": context.seed, "baselines": False, "corruption": CORRUPTION[name]})
    if context.manual_dir is None:
        examples = configs.imported(f"{module}.task:load_examples")(config)
    else:
        manual = Path(context.manual_dir).expanduser()
        inside = manual / "mnist"
        published = configs.imported(f"{module}.published:load_examples")
        examples = published(inside if inside.is_dir() else manual, CORRUPTION[name])
    model = configs.imported(f"{module}.model:make_model")(config.model, examples.num_classes)
    error = configs.imported(f"{module}.model:error")
    task = make_task(config, examples)

    def measure(state) -> Measured:
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner_params)):
            return Measured(np.nan, np.nan)
        validation = error(model, state, examples.validation_images, examples.validation_labels)
        test = error(model, state, examples.test_images, examples.test_labels)
        return Measured(test, validation)

    column = 1 + list(CORRUPTION).index(name)
    finals = {row[0].lower(): row[column] for row in _PUBLISHED}
    return BenchTask(
        name=name,
        task=task,
        measure=measure,
        optimizers=optimizers,
        quantity="test error",
        unit="fraction",
        default=DEFAULT,
        seconds=30.0,
        published=(_HEADER, _PUBLISHED),
        published_note="Test errors, median of 10 seeds (p = .5: one seed), full MNIST; p is the "
        "share of labels drawn anew.",
        published_finals=finals if context.manual_dir is not None else {},
    )
