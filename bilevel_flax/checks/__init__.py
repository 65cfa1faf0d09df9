"""Mistakes of whoever calls, told in one line before anything is computed."""

from bilevel_flax.base.problem import check_problem as problem
from bilevel_flax.checks.arguments import (
    UserError,
    as_count,
    at_least,
    check_count,
    check_number,
    check_partition,
    check_positive,
    key,
    learning_rate,
    optimizer,
)
from bilevel_flax.checks.batches import (
    batch,
    check_finite,
    require_ids,
)
from bilevel_flax.checks.problems import (
    check_sum,
    has_value,
    host_moves_z,
    hosts_z,
    losses,
    outer_loss_sees_all,
    parameters,
    per_sample,
    warn_unless_finite_sum,
)

__all__ = [
    "UserError",
    "as_count",
    "at_least",
    "batch",
    "check_count",
    "check_finite",
    "check_number",
    "check_partition",
    "check_positive",
    "check_sum",
    "has_value",
    "host_moves_z",
    "hosts_z",
    "key",
    "learning_rate",
    "losses",
    "optimizer",
    "outer_loss_sees_all",
    "parameters",
    "per_sample",
    "problem",
    "require_ids",
    "warn_unless_finite_sum",
]
