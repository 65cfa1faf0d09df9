r"""Which text a language model should read for a target, learned while it trains.

    bilevel-flax train --config configs/lm_data_mixing.py --workdir runs/mix
    bilevel-flax train --config configs/lm_data_mixing.py --workdir runs/mix --config.target=python
    bilevel-flax train --config configs/lm_data_mixing.py --workdir runs/mine \
        --config.domains.mail=mail.txt --config.domains.man=man.txt.gz --config.target=notes.txt

Domains: those given, and those of BILEVEL_FLAX_DATA/text (`--config.default_domains=false`: only
those given); without either the package's own source and docstrings. What is what:
examples/lm_data_mixing/settings.py and README.md.

Hardware: any CPU. With all comparisons some two CPU minutes on an idle core, a third of it
compilation. What has been measured, and what has not: benchmarks/results/lm_data_mixing.md.
"""

import ml_collections

from examples.lm_data_mixing import settings


def get_config() -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.name = "lm_data_mixing"
    settings.add(config)  # text, what is learned of it, what it is compared with
    # The model.
    config.size = "micro"
    config.dtype = "float32"
    config.remat = False
    config.length = 64
    config.batch_size = 8

    config.steps = 600
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint = {"every": 200}
    # A run this short would spend more on its health than on itself: 0.03 for a long one.
    config.health = {"every": 0, "summary": False}
    steps = config.get_oneway_ref("steps")
    config.solver = {
        "call": "bilevel_flax:auto",
        "steps": steps,
        **settings.SCHEDULE,
        "inner": {
            "call": "examples.language_model.task:adamw",
            "learning_rate": 3e-3,
            "steps": steps,
        },
    }
    return config
