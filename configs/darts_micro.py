"""Architecture search where the truth is known: 625 networks, all of them trained.

    bilevel-flax train --config configs/darts_micro.py --workdir runs/micro
    bilevel-flax bench darts_micro --solvers soba,darts1,darts2

Four edges with NAS-Bench-201's five operations each, 14x14 digits of the bundled mnist5k, one half
for z and one for the architecture. SOBA by default; `:auto`, `:saba`, `:srba`, `:darts1`, `:darts2`
spend the same gradient units, twice those of plain training. Each edge's operation is chosen by
what its removal costs; `--config.selection=strongest` is DARTS's rule.

Hardware: any CPU, less than two minutes with compilation. Expected (`summary.json`): regret, in
test accuracy against the best of the 625, below 0.01, and a rank_percentile below 0.05
(benchmarks/results/architecture_search.md).
"""

import ml_collections

from examples.darts.micro import methods as micro_methods
from examples.darts.micro.space import OPERATIONS


def get_config(method: str = "soba") -> ml_collections.ConfigDict:
    """The config; the argument names the search method."""
    micro_methods.check_method(method, f"--config=configs/darts_micro.py:{method}")
    config = ml_collections.ConfigDict()
    config.name = "darts_micro"
    config.method = method
    config.steps = micro_methods.steps_of(method)
    config.batch_size = 64
    config.channels = 8
    config.space = {"name": "micro", "operations": OPERATIONS}
    config.selection = "perturbation"
    config.log_every = 10
    config.eval_every = 25
    config.checkpoint = {"every": 50, "keep": 2}
    config.health = {"every": 0, "summary": False}
    config.task = {"call": "examples.darts.micro.task:make_task"}
    config.report = "examples.darts.micro.task:sections"
    config.solver = {
        "call": "examples.darts.micro.methods:make_solver",
        "method": config.get_oneway_ref("method"),
        "steps": config.get_oneway_ref("steps"),
    }
    return config
