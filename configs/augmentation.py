"""Augmentation: learn magnitude and probability of image operations while the network trains.

    bilevel-flax train --config configs/augmentation.py --workdir runs/augmentation

is `bf.auto` with nothing to tune, on 1,000 training digits (mnist5k, bundled); full MNIST:
`--config.data.name=mnist --config.data.manual_dir=DIR`. `--config.planted=rotate` (or `shift`)
varies the validation and test images only, so that what should be found is known.
`--config.per_class=True` learns a policy for each class, `--config.data.name=signals` does so
on bursts in noise with one planted invariance for each of two classes:

    bilevel-flax train --config configs/augmentation.py --config.data.name=signals \
        --config.per_class=True --workdir runs/signals

`--config.solver.update_every=4 --config.solver.adjoint_update_every=2` is the cheap setting
(docs/auto.md).

Hardware: any CPU; the search and five trainings that it is compared with take some two minutes on 2
quiet cores. Expected results: benchmarks/results/augmentation.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.outer.augmentation import IMAGE_OPERATIONS, SIGNAL_OPERATIONS


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.name = "augmentation"
    config.steps = 3000
    config.batch_size = 64
    config.model = config_dict.placeholder(str)  # cnn, mlp, linear; signals: spectrum
    config.regularization = config_dict.placeholder(float)
    config.planted = "none"  # rotate, shift
    config.per_class = False
    config.operations = config_dict.placeholder(tuple)  # None: all
    # The largest magnitudes that can be learned, in the operations' units; None: their own.
    config.limits = {
        name: config_dict.placeholder(float)
        for name, each in {**IMAGE_OPERATIONS, **SIGNAL_OPERATIONS}.items()
        if each.graded
    }
    # Where all operations start: a fraction of the largest magnitude (None: 0.2, signals 0.5), and
    # a probability.
    config.magnitude = config_dict.placeholder(float)
    config.probability = 0.5
    config.temperature = 0.2  # of the relaxed draws
    config.hard = False  # straight-through draws
    config.baselines = True
    config.uniform_magnitudes = (0.1, 0.3)  # fractions; the better one on validation data counts
    config.data = {
        "name": "mnist5k",  # any TFDS image set, or signals
        "manual_dir": config_dict.placeholder(str),
        "data_dir": config_dict.placeholder(str),
        "splits": config_dict.placeholder(tuple),
        "size": 14,  # of images, after averaging blocks of pixels; None: as they are
    }
    config.task = {"call": "examples.augmentation.task:make_task"}
    config.report = "examples.augmentation.report:sections"
    steps = config.get_oneway_ref("steps")
    config.solver = {
        "call": "bilevel_flax:auto",
        "steps": steps,
        "inner": {
            "call": "examples.augmentation.task:adamw",
            "learning_rate": 1e-3,
            "steps": steps,
        },
    }
    return config
