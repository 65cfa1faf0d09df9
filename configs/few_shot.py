"""Few-shot classification of Omniglot's characters: an initialisation that adapts from one drawing.

    bilevel-flax train --config configs/few_shot.py --workdir runs/few_shot \
        --config.data.manual_dir=DIR

DIR holds images_background_small1.zip (or images_background.zip) of the original source. The
argument is the method: `:imaml` (the default: gradient descent to near the optimum of each task,
then conjugate gradients), `:tracked` (tasks that recur, one step on z and v at each visit); to
compare with, `:maml` (backprop through the steps), `:first_order` (MAML without second derivatives)
and `:prototypes` (prototypical networks). `--config.ways=20` is the 20-way protocol. Alphabets of
meta-training, validation and meta-test are apart.

Hardware: any CPU, three minutes on 2 shared cores (1:40 of CPU time); what it reaches:
benchmarks/results/few_shot.md.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.train.config import check_choice

# λ, the step of gradient descent and how many of them, in training and where it is measured; the
# scale of the logits in F, Adam's step.
KEYS = ("proximal", "inner_rate", "inner_steps", "adapt_steps", "query_scale", "learning_rate")
SETTINGS = {
    "imaml": (0.2, 0.1, 20, 20, 4.0, 8e-3),
    "tracked": (0.2, 0.2, 1, 20, 1.0, 4e-3),
    "maml": (0.0, 0.2, 5, 5, 4.0, 8e-3),
    "first_order": (0.0, 0.2, 5, 5, 1.0, 4e-3),
    "prototypes": (0.0, 0.0, 0, 0, 1.0, 8e-3),
}
SOLVERS = {
    "imaml": ("imaml", ("inner_rate", "inner_steps", "adjoint_steps")),
    "tracked": ("tracked", ("inner_rate",)),
    "maml": ("maml", ("inner_rate", "inner_steps")),
    "first_order": ("maml", ("inner_rate", "inner_steps")),
    "prototypes": ("prototypes", ()),
}


def get_config(method: str = "imaml") -> ml_collections.ConfigDict:
    """The config; the argument names the method."""
    check_choice(f"--config=configs/few_shot.py:{method}", method, tuple(SOLVERS))
    config = ml_collections.ConfigDict()
    config.name = "few_shot"
    config.method = method
    config.steps = 2000
    config.batch_size = 8  # tasks
    config.tasks_at_once = 2  # whose query images are in memory at a time
    config.eval_every = 250
    config.log_every = 50
    config.adapts = "head" if method in ("imaml", "tracked") else "network"
    config.ways = 5
    config.shots = 1
    config.queries = 5
    config.width = 32
    config.tasks = 2000 if method == "tracked" else 12_000
    config.copies = 5  # distorted ones of each drawing, beside it
    config.evaluated = 400  # tasks of each part
    config.update(dict(zip(KEYS, SETTINGS[method], strict=True)))
    config.adjoint_steps = 10
    config.health = {"summary": False, "every": 0}  # z and v are those of the last tasks alone
    config.data = {
        "manual_dir": config_dict.placeholder(str),
        "train": ("Korean", "Balinese", "Greek"),
        "validation": ("Early_Aramaic",),
        "test": ("Latin",),
        "look_at_test": True,  # at the end
    }
    config.task = {"call": "examples.few_shot.task:make_task"}
    solver, keys = SOLVERS[method]
    config.solver = {
        "call": f"examples.few_shot.solvers:{solver}",
        "outer": {
            "call": "optax:adam",
            "learning_rate": {
                "call": "optax:cosine_decay_schedule",
                "init_value": config.get_oneway_ref("learning_rate"),
                "decay_steps": config.get_oneway_ref("steps"),
            },
        },
        **{key: config.get_oneway_ref(key) for key in keys},
    }
    return config
