"""Data hypercleaning: find the wrong labels while the network trains.

    bilevel-flax train --config configs/mnist_hypercleaning.py --workdir runs/clean

is `bf.auto`, with nothing to tune: `--config.model=linear|mlp|cnn`, `--config.data.name=NAME`,
`--config.noise=symmetric|class` (docs/auto.md: what it reaches). Its z takes
`--config.inner=sgd|momentum|adamw` (default: SGD for the linear model, AdamW for the others).
`--config.weights=sigmoid|softmax|meta_weight_net` is the parametrisation. `:soba`, `:saba`,
`:srba` ... are the papers' methods with SGD on z, for the linear model.

Hardware: any CPU. mnist5k (the default, bundled): under a minute on 2 cores. Full MNIST
(`--config.data.name=mnist --config.data.manual_dir=DIR`): see benchmarks/README.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.solvers import table
from bilevel_flax.train.config import ConfigError, nearest

# The single-loop methods, with what each wants beside the optimisers.
SOLVERS = {
    "soba": {},
    "saba": {},
    "srba": {"period": 100},
    "spaba": {"probability": 0.01},
    "masoba": {},
    "storm": {},
    "fsla": {},
    "auto": {},
}


def get_config(solver: str = "auto") -> ml_collections.ConfigDict:
    """The config; the argument names the solver."""
    if solver not in SOLVERS:
        raise ConfigError(
            f"--config=configs/mnist_hypercleaning.py:{solver}: choose one of "
            f"{', '.join(SOLVERS)}{nearest(solver, list(SOLVERS))}"
        )
    config = ml_collections.ConfigDict()
    config.name = "mnist_hypercleaning"
    config.seed = 0
    config.epochs = 64.0  # visits of every training example
    config.steps = config_dict.placeholder(int)  # None: `epochs` passes over the training data
    config.batch_size = 64
    config.corruption = 0.5
    config.noise = "symmetric"
    config.model = "linear"
    config.inner = config_dict.placeholder(str)
    config.weights = "sigmoid"
    config.regularization = config_dict.placeholder(float)
    config.baselines = True
    config.log_every = 100
    config.eval_every = 200
    config.checkpoint = {"every": 1000, "keep": 3}
    config.health = {"every": config_dict.placeholder(int), "summary": True}
    config.on_device = config_dict.placeholder(bool)
    config.mesh = config_dict.placeholder(str)  # "data=8": docs/sharding.md
    config.collectives = config_dict.placeholder(str)  # None: "floor" or "xla", as the losses allow
    config.rules = config_dict.placeholder(tuple)
    config.data = {
        "name": "mnist5k",
        "manual_dir": config_dict.placeholder(str),
        "data_dir": config_dict.placeholder(str),
        "splits": config_dict.placeholder(tuple),
        "held_out": 0.0,  # share of the validation data that F never sees, to watch for memorising
    }
    config.task = {"call": "examples.mnist_hypercleaning.task:make_task"}
    config.problem = {
        "remat": False,
        "microbatches": 1,
        "compute_dtype": config_dict.placeholder(str),  # "bfloat16", beside float32 masters
    }
    config.report = "examples.mnist_hypercleaning.report:sections"
    steps = config.get_oneway_ref("steps")
    if solver == "auto":
        inner = {
            "call": "examples.mnist_hypercleaning.rates:inner_optimizer",
            "name": config.get_oneway_ref("inner"),
            "model": config.get_oneway_ref("model"),
            "steps": steps,
        }
        config.solver = {"call": "bilevel_flax:auto", "steps": steps, "inner": inner}
        return config
    rate = {
        "call": "optax:linear_schedule",
        "init_value": 0.01,
        "end_value": 0.0,
        "transition_steps": steps,
    }
    config.solver = {
        "call": table.qualified_name(solver),
        "inner": {"call": "optax:sgd", "learning_rate": rate},
        "outer": {
            "call": "bilevel_flax.outer:normalized_sgd",
            "learning_rate": {
                "call": "examples.mnist_hypercleaning.rates:outer_rate",
                "weights": config.get_oneway_ref("weights"),
                "steps": steps,
                "peak": config_dict.placeholder(float),
            },
        },
        **SOLVERS[solver],
    }
    return config
