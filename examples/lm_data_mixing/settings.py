"""What the task reads of a config beside the model and the run: text, mixture, comparisons."""

from __future__ import annotations

import ml_collections
from ml_collections import config_dict

from bilevel_flax.train.config import OpenMapping


def add(config: ml_collections.ConfigDict) -> None:
    """Adds the keys, and the sections of the task and of its report."""
    # Text: domains by name, a target by its name or its file.
    config.domains = OpenMapping()
    config.default_domains = True  # those of BILEVEL_FLAX_DATA/text as well
    config.target = config_dict.placeholder(str)  # None: shakespeare, or else the first domain
    config.target_in_mixture = True  # the rest of a target that is a domain is trained on
    config.data = {
        "outer_share": 0.02,
        "validation_share": 0.08,
        "test_share": 0.1,
        "windows_measured": 512,  # of the validation text, at every `eval_every`
    }
    # What is learned.
    config.mixture = "curriculum"  # or "domains", "network"
    config.curriculum = {"epochs": 7.0}  # that a text is read for the target's sake, at most
    config.temperature = 1.0  # of the logits of domains: with less the same steps of x go further
    config.use = "sampling"  # or "weighting"
    config.oversampling = config_dict.placeholder(int)  # None: the number of domains
    # What it is compared with.
    config.baselines = True
    config.direct_share = 0.25  # of direct_mix's minibatches
    config.rivals = {
        "direct_shares": (0.1, 0.25, 0.5, 0.75, 1.0),  # of which direct_mix_tuned takes the best
        "doremi_rate": 1.0,
        "regmix_runs": 16,
        "regmix_share": 0.25,  # of a run's steps, in each of them
    }
    config.finetune = {"steps": 100, "learning_rate": 1e-3}
    config.task = {"call": "examples.lm_data_mixing.task:make_task"}
    config.report = "examples.lm_data_mixing.report:sections"


# F holds one half of the sample while x is learned; then x stands still, and all is read.
SCHEDULE = {"cooldown": 0.7, "update_every": 2}
