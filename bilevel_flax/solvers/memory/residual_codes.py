"""What SABA memorises of a minibatch: its oracles, or codes that stand for them exactly."""

from __future__ import annotations

from collections.abc import Callable

import jax

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, Variables
from bilevel_flax.oracles.evaluate import NOTHING, Evaluation
from bilevel_flax.oracles.linear_models import linear_loss
from bilevel_flax.oracles.residual_codes import Codes, check_linear, evaluate_linear
from bilevel_flax.solvers.memory import saga


def storable(decode: Callable[[Oracles], Oracles]) -> Callable[[Oracles], Oracles]:
    """`decode` without the leaves that have no part in a memory."""
    return lambda residuals: saga.storable(decode(residuals))


def codes_of(evaluation: Evaluation) -> Codes:
    """What is memorised of an evaluation: by default the oracles themselves."""
    if evaluation.codes is not None:
        return evaluation.codes
    return Codes(evaluation.oracles, NOTHING, lambda oracles: oracles)


def shapes(
    problem: Problem, variables: Variables, coded_like: Batch | None
) -> tuple[Oracles, Oracles]:
    """What is stored of a minibatch, and what it stands for: trees of shapes and dtypes."""
    z, v, x = variables
    if coded_like is None:
        grad = saga.storable(z)
        shared = rows.map_prefix(problem.per_sample, lambda _: None, saga.storable, x)
        whole = Oracles(grad, grad, shared, grad, shared)
        return whole, whole

    def both(z, v, x, batch):
        check_linear(problem, z, batch.inner)
        codes = evaluate_linear(problem, Variables(z, v, x), batch).codes
        return saga.storable(codes.residuals), storable(codes.decode)(codes.residuals)

    return jax.eval_shape(both, z, v, x, coded_like)


def check_memory(memory: str, problem: Problem, example_batch: Batch | None) -> None:
    """Raises unless `saba` can keep a memory of that form.

    Raises:
        ValueError: names the argument that is wrong or missing.
    """
    if memory not in ("full", "compact"):
        raise ValueError(f'memory={memory!r} is unknown: choose "full" or "compact"')
    if memory == "full":
        return
    if linear_loss(problem.inner_loss) is None or linear_loss(problem.outer_loss) is None:
        raise ValueError(
            'memory="compact" needs a problem made by bf.linear_problem (losses of logits that '
            'are linear in inner_params): make it so, or use memory="full"'
        )
    if example_batch is None or example_batch.inner is None or example_batch.outer is None:
        raise ValueError(
            'memory="compact" needs example_batch=Batch(inner, outer), a minibatch of each side '
            "or its shapes: the number of examples in it is that of residuals in a row"
        )
