r"""Which text a language model should read for a target, learned while it trains.

    bilevel-flax train --config configs/lm_data_mixing.py --workdir runs/mix
    bilevel-flax train --config configs/lm_data_mixing.py --workdir runs/mix --config.target=python
    bilevel-flax train --config configs/lm_data_mixing.py --workdir runs/mine \
        --config.domains.mail=mail.txt --config.domains.man=man.txt.gz --config.target=notes.txt

Domains: those given, and those of BILEVEL_FLAX_DATA/text (`--config.default_domains=false`: only
those given); without either the package's own source and docstrings. What is what:
examples/lm_data_mixing/README.md.

Hardware: any CPU. With all comparisons some two CPU minutes on an idle core, a third of it
compilation. What has been measured, and what has not: benchmarks/results/lm_data_mixing.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.train.config import OpenMapping


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.name = "lm_data_mixing"
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
    # The model.
    config.size = "micro"
    config.dtype = "float32"
    config.remat = False
    config.length = 64
    config.batch_size = 8
    # What is learned.
    config.mixture = "curriculum"  # or "domains", "network"
    config.curriculum = {"epochs": 7.0}  # that the target's sample is read, at most
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

    config.steps = 600
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint = {"every": 200}
    # A run this short would spend more on its health than on itself: 0.03 for a long one.
    config.health = {"every": 0, "summary": False}
    config.task = {"call": "examples.lm_data_mixing.task:make_task"}
    config.report = "examples.lm_data_mixing.report:sections"
    steps = config.get_oneway_ref("steps")
    config.solver = {
        "call": "bilevel_flax:auto",
        "steps": steps,
        # F holds one half of the sample while x is learned; then x stands still, and all is read.
        "cooldown": 0.7,
        "update_every": 2,
        "inner": {
            "call": "examples.language_model.task:adamw",
            "learning_rate": 3e-3,
            "steps": steps,
        },
    }
    return config
