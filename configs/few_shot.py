"""Few-shot classification of Omniglot's characters: an initialisation that adapts from one drawing.

    bilevel-flax train --config configs/few_shot.py --workdir runs/few_shot \
        --config.data.manual_dir=DIR

DIR holds images_background_small1.zip (or images_background.zip) of the original source. The
argument is the method: `:imaml` (the default: gradient descent to near the optimum of each task,
then conjugate gradients), `:tracked` (tasks that recur, one step on z and v at each visit), `:maml`
(backprop through the steps). `--config.ways=20` is the 20-way protocol. Alphabets of meta-training
and meta-test are apart; the summary compares with MAML and first-order MAML.

Hardware: any CPU, about 15 steps a second on 2 shared cores; what it reaches so far:
examples/few_shot/README.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.train.config import check_choice

SOLVERS = ("imaml", "tracked", "maml")


def get_config(solver: str = "imaml") -> ml_collections.ConfigDict:
    """The config; the argument names the method."""
    check_choice(f"--config=configs/few_shot.py:{solver}", solver, SOLVERS)
    config = ml_collections.ConfigDict()
    config.name = "few_shot"
    config.steps = 1000
    config.batch_size = 4  # tasks
    config.eval_every = 250
    config.log_every = 50
    config.ways = 5
    config.shots = 1
    config.queries = 5
    config.width = 16
    config.recurring = solver == "tracked"
    config.tasks = 400 if solver == "tracked" else 8000
    config.evaluated = 200  # tasks of each part
    config.proximal = 0.5
    config.inner_rate = 0.1
    config.inner_steps = 10
    config.adjoint_steps = 5
    config.adapt_steps = 10  # where a network is measured
    config.unrolled_rate = 0.1  # of MAML, as many steps in training as where it is measured
    config.unrolled_steps = 5
    config.learning_rate = 1e-3
    config.baselines = True
    config.health = {"summary": False, "every": 0}  # z and v are those of the last tasks alone
    config.data = {
        "manual_dir": config_dict.placeholder(str),
        "train": ("Korean", "Balinese", "Greek"),
        "validation": ("Early_Aramaic",),
        "test": ("Latin", "Early_Aramaic"),
    }
    config.task = {"call": "examples.few_shot.task:make_task"}
    counts = {
        "imaml": {"inner_steps": "inner_steps", "adjoint_steps": "adjoint_steps"},
        "tracked": {},
        "maml": {"inner_steps": "unrolled_steps"},
    }[solver]
    config.solver = {
        "call": f"examples.few_shot.solvers:{solver}",
        "inner_rate": config.get_oneway_ref("unrolled_rate" if solver == "maml" else "inner_rate"),
        "outer": {"call": "optax:adam", "learning_rate": config.get_oneway_ref("learning_rate")},
        **{name: config.get_oneway_ref(key) for name, key in counts.items()},
    }
    return config
