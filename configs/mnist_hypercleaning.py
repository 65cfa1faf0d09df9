"""Data hypercleaning: find the wrong labels while the network trains.

    bilevel-flax train --config configs/mnist_hypercleaning.py --workdir runs/clean

is `bf.auto`, with nothing to tune: `--config.model=linear|mlp|cnn`, `--config.data.name=NAME`,
`--config.noise=symmetric|class|instance` (docs/auto.md: what it reaches). Its z takes
`--config.inner=sgd|momentum|adamw` (default: SGD for the linear model, AdamW for the others).
`--config.weights=sigmoid|softmax|meta_weight_net` is the parametrisation. `:soba`, `:saba`,
`:srba` ... are the papers' methods with SGD on z, for the linear model. `:structured` is where
cleaning pays: two labels of five are the next class's, 100 are clean, a small network.

Images of your own: `--config.data.name=FILE.npz` (`images` uint8 [n, height, width(, channels)],
`labels` [n]) or `=FOLDER` (CLASS/IMAGE); `--config.corruption=0` where their labels are wrong as
they are. `suspicious.csv` then lists whom to look at first.

Hardware: any CPU. mnist5k (the default, bundled): under a minute on 2 cores. Full MNIST
(`--config.data.name=mnist --config.data.manual_dir=DIR`): benchmarks/results/hypercleaning.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.solvers import table
from bilevel_flax.train.config import check_choice

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
    """The config; the argument names the solver, or is `structured`."""
    if solver == "structured":
        return structured()
    known = {**SOLVERS, "structured": {}}
    check_choice(f"--config=configs/mnist_hypercleaning.py:{solver}", solver, known)
    config = ml_collections.ConfigDict()
    config.name = "mnist_hypercleaning"
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
    config.rounds = False  # filter and relabel by hand, four more trainings, as a baseline
    config.data = {
        "name": "mnist5k",
        "manual_dir": config_dict.placeholder(str),
        "data_dir": config_dict.placeholder(str),
        "splits": config_dict.placeholder(tuple),
        "held_out": 0.0,  # share of the validation data that F never sees, to watch for memorising
    }
    config.task = {"call": "examples.mnist_hypercleaning.task:make_task"}
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


def structured() -> ml_collections.ConfigDict:
    """`auto` on labels that are wrong in a pattern, with few clean ones, beside rounds by hand."""
    config = get_config("auto")
    config.update(model="mlp", noise="class", corruption=0.4, epochs=16.0, rounds=True)
    config.update({"data": {"splits": (3900, 100, 1000)}})
    return config
