"""What SABA memorises of a minibatch: its oracles, or codes that stand for them exactly."""

from __future__ import annotations

from collections.abc import Callable

import jax

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, Variables
from bilevel_flax.solvers.memory import saga as saga_memory


def storable(decode: Callable[[Oracles], Oracles]) -> Callable[[Oracles], Oracles]:
    """`decode` without the leaves that have no part in a memory."""
    return lambda codes: saga_memory.storable(decode(codes))


def of(found: oracles.Evaluation) -> oracles.Components:
    """What is memorised of an evaluation: by default the oracles themselves."""
    if found.components is not None:
        return found.components
    return oracles.Components(found.oracles, Oracles(*(None,) * 5), lambda codes: codes)


def shapes(
    problem: Problem, variables: Variables, coded_like: Batch | None
) -> tuple[Oracles, Oracles]:
    """What is stored of a minibatch, and what it stands for: trees of shapes and dtypes."""
    z, v, x = variables
    if coded_like is None:
        grad = saga_memory.storable(z)
        shared = rows.map_prefix(problem.per_sample, lambda _: None, saga_memory.storable, x)
        whole = Oracles(grad, grad, shared, grad, shared)
        return whole, whole

    def both(z, v, x, batch):
        oracles.check_linear(problem, z, batch.inner)
        parts = oracles.evaluate_linear(problem, Variables(z, v, x), batch).components
        return saga_memory.storable(parts.codes), storable(parts.decode)(parts.codes)

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
    if problem.linear is None:
        raise ValueError(
            'memory="compact" needs a problem made by bf.linear_problem (losses of logits that '
            'are linear in inner_params): make it so, or use memory="full"'
        )
    if example_batch is None or example_batch.inner is None or example_batch.outer is None:
        raise ValueError(
            'memory="compact" needs example_batch=Batch(inner, outer), a minibatch of each side '
            "or its shapes: the number of examples in it is that of residuals in a row"
        )
