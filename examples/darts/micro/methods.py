"""The search methods of the micro-space, all with one budget in oracle units.

Plain training of the supernet is PLAIN_STEPS steps; a search may cost twice that. What a method
pays for a step decides how many it takes.
"""

from __future__ import annotations

import optax

import bilevel_flax as bf
from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.solvers import table
from bilevel_flax.train.config import ConfigError, nearest

PLAIN_STEPS = 500
BUDGET = 2 * PLAIN_STEPS
# Oracle units of one step. SRBA looks at two points, and walks over all the data every 78 steps:
# 8 units, and 4 for its share of the passes.
UNITS = {
    "soba": 4.0,
    "saba": 4.0,
    "srba": 12.0,
    "auto": 4.0,
    "darts1": 2.0,
    "darts2": 4.0,
}
METHODS = tuple(UNITS)
INNER_RATE = 0.01
# x's learning rate a unit, so that x can travel equally far in the budget, whatever the steps cost.
OUTER_RATE = 0.05 / 4


def check_method(name: str, where: str) -> str:
    """The name, if there is such a method.

    Raises:
        ConfigError: the nearest name is given.
    """
    if name not in UNITS:
        raise ConfigError(
            f"{where}: method {name!r} is unknown, choose among {', '.join(METHODS)}"
            f"{nearest(name, list(METHODS))}"
        )
    return name


def steps_of(method: str, budget: float = BUDGET) -> int:
    """How many updates the budget in gradient units pays for."""
    return int(budget / UNITS[method])


def make_solver(
    problem: Problem,
    method: str,
    steps: int,
    num_inner_batches: int,
    num_outer_batches: int,
    inner_rate: float = INNER_RATE,
    outer_rate: float = OUTER_RATE,
) -> BilevelSolver:
    """A search method with Adam on z and on x.

    Args:
        problem: the search's.
        method: one of METHODS.
        steps: of the run; z's learning rate falls to 0 there by a cosine.
        num_inner_batches: minibatches of G's data.
        num_outer_batches: of F's.
        inner_rate: z's learning rate at the start.
        outer_rate: x's, for each unit that a step costs.

    Raises:
        ConfigError: an unknown method.
    """
    check_method(method, "--config.method")
    inner = optax.adam(optax.cosine_decay_schedule(inner_rate, max(1, steps)))
    outer = optax.adam(outer_rate * UNITS[method], b1=0.5)
    if method in ("darts1", "darts2"):
        return table.method(method)(problem, inner=inner, outer=outer)
    if method == "auto":
        return bf.auto(problem, inner=inner, outer=outer, steps=steps)
    more = {}
    if method in ("saba", "srba"):
        more = {"num_inner_batches": num_inner_batches, "num_outer_batches": num_outer_batches}
    if method == "srba":
        more["period"] = num_inner_batches + num_outer_batches
    return table.method(method)(problem, inner=inner, outer=outer, **more)
