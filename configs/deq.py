"""Deep equilibrium network: a layer iterated to its fixed point, trained without unrolling it.

    bilevel-flax train --config configs/deq.py --workdir runs/deq

The argument is the method: `:soba` (the default: a hidden state and an adjoint for each training
example, tracked from visit to visit) or `:bsg` (fixed point and adjoint solved for in every step,
GMRES). The summary compares with the same layer unrolled, with optimistix's implicit adjoint, and
with an explicit network of as many parameters.

Hardware: any CPU. mnist5k (the default, bundled): about two minutes on 2 cores. Needs optimistix:
pip install 'bilevel-flax[fixed_point]'.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.train.config import check_choice

STATES = {"soba": "example", "bsg": "minibatch"}


def get_config(solver: str = "soba") -> ml_collections.ConfigDict:
    """The config; the argument names the solver."""
    check_choice(f"--config=configs/deq.py:{solver}", solver, STATES)
    config = ml_collections.ConfigDict()
    config.name = "deq"
    config.epochs = 60.0
    config.steps = config_dict.placeholder(int)
    config.batch_size = 100
    config.eval_every = 300
    config.width = 64
    config.margin = 0.5  # of the layer's monotonicity
    config.step = 0.5  # of the iteration z += step * (layer(z) - z)
    config.iterations = 3 if solver == "soba" else 1  # of the layer in one condition
    config.decay = 1e-4
    config.learning_rate = 1e-3
    config.tolerance = 1e-4  # largest entry of the condition, where a network is measured
    config.max_iterations = 1000
    config.inner_steps = 15  # of bsg, from the state before
    config.adjoint_steps = 10
    config.unrolled_steps = 40
    config.states = STATES[solver]
    config.state_dtype = "float16" if solver == "soba" else "float32"  # z and v between visits
    config.baselines = True
    # The check at a run's end asks whether v solves the system of all data; solved, z and v are
    # those of the last minibatch alone.
    config.health = {"summary": solver == "soba"}
    if solver == "bsg":
        config.health = {"summary": False, "every": 0}
    config.data = {
        "name": "mnist5k",
        "manual_dir": config_dict.placeholder(str),
        "data_dir": config_dict.placeholder(str),
        "splits": config_dict.placeholder(tuple),
    }
    config.task = {"call": "examples.deq.task:make_task"}
    counts = ("inner_steps", "adjoint_steps") if solver == "bsg" else ()
    config.solver = {
        "call": "examples.deq.solvers:" + ("tracked" if solver == "soba" else "solved"),
        "outer": {
            "call": "optax:adam",
            "learning_rate": {
                "call": "optax:cosine_decay_schedule",
                "init_value": config.get_oneway_ref("learning_rate"),
                "decay_steps": config.get_oneway_ref("steps"),
            },
        },
        **{name: config.get_oneway_ref(name) for name in counts},
    }
    return config
