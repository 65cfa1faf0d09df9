"""Losses that take modules, as a `Problem` of plain pytrees."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

from bilevel_flax.base import Aux, Problem, PyTree
from bilevel_flax.nnx.modules import (
    check_fits,
    check_model,
    is_template,
    map_modules,
    moved,
    plain,
    rngs_from,
    template_of,
)


def problem(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    model: nnx.Module,
    outer: PyTree,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    per_sample: PyTree = None,
    **settings: Any,
) -> Problem:
    """A bilevel problem whose losses take NNX modules.

    Args:
        inner_loss: G, `loss(model, outer, batch) -> scalar`, the mean over the minibatch. It is
            handed the module in train mode (`model.train()`). With a fourth argument called `rngs`
            it is handed an `nnx.Rngs` of the step's own as well, for `model(images, rngs=rngs)`.
        outer_loss: F, of the same form, in evaluation mode (`model.eval()`). What it does to the
            module's variables is dropped.
        model: the module that is trained; only its structure is kept, so any one of the same
            architecture serves.
        outer: x: arrays, modules (e.g. a network that gives weights), or a pytree of both. The
            losses see modules where there are modules here.
        wrt: which variables of `model` are z, as for `nnx.Optimizer`. The others are constants,
            as far as the loss leaves them alone.
        has_aux: the losses return `(scalar, aux)`. A dict of arrays goes into `Info.metrics` under
            its names, anything else under the name `aux`: logits are `info.metrics["inner_aux"]`.
        per_sample: as for `Problem`.
        **settings: `derivatives`, as for `Problem`.

    Returns:
        A `Problem` for any solver. It is stateful exactly if the module has other variables than
        z (BatchNorm, dropout), a loss takes `rngs`, or `has_aux`. Make its state by `init` or
        `Optimizer`.

    Raises:
        TypeError: `model` is no `nnx.Module`; at trace time a loss returns something else, or
            draws from an `nnx.Rngs` made outside of it.
        ValueError: there is nothing to learn in `model`; at trace time a state of another module.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> from flax import nnx
        >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> def outer_loss(model, penalty, batch):
        ...     return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        >>> def inner_loss(model, penalty, batch):
        ...     fit = outer_loss(model, penalty, batch)
        ...     return fit + jnp.exp(penalty) * jnp.sum(model.kernel[...] ** 2)
        >>> penalty = jnp.array(0.0)
        >>> problem = bf.nnx.problem(inner_loss, outer_loss, model, penalty)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.3))
        >>> optimizer = bf.nnx.Optimizer(model, solver, penalty)
        >>> update = nnx.jit(lambda model, optimizer, batch: optimizer.update(model, batch))
        >>> data = {"x": jnp.array([[1.0], [-1.0]]), "y": jnp.array([[3.0], [-3.0]])}
        >>> for _ in range(300):
        ...     info = update(model, optimizer, bf.Batch(data, data))
        >>> bool(optimizer.outer < -1.5), bool(model.kernel[0, 0] > 2.0)  # less penalty
        (True, True)
    """
    check_model(model, wrt)
    inside = template_of(model, wrt)
    outside = map_modules(lambda node: template_of(node, nnx.Param), lambda leaf: leaf, outer)
    modules = [t for t in jax.tree.leaves(outside, is_leaf=is_template) if is_template(t)]
    random = inside.streams, *(t.streams for t in modules)
    losses = {"inner_loss": inner_loss, "outer_loss": outer_loss}
    draws = {name: "rngs" in _parameters(loss) for name, loss in losses.items()}
    stateful = has_aux or bool(inside.rest) or any(bool(streams) for streams in random)
    stateful = stateful or any(draws.values())

    def rebuilt_outer(x, rng):
        def rebuild(template, node):
            if not is_template(template):
                return node
            check_fits("outer_params", node, template.learned, "outer module")
            return template.module(node, plain(template.rest), rng)

        return jax.tree.map(rebuild, outside, x, is_leaf=is_template)

    def call(loss, name, train, z, x, batch, model_state=None, rng=None):
        check_fits("inner_params", z, inside.learned, "model")
        rest = plain(inside.rest) if model_state is None else model_state
        if inside.rest:
            check_fits("model_state", rest, inside.rest, "model")
        module = inside.module(z, rest, rng)
        module.train() if train else module.eval()
        more = {"rngs": rngs_from(rng)} if draws[name] else {}
        try:
            out = loss(module, rebuilt_outer(x, rng), batch, **more)
        except TraceContextError as error:
            raise TypeError(
                f"{name} changes an NNX object that was made outside of it ({error}): an nnx.Rngs "
                f"is to be an argument, {name}(model, outer, batch, rngs); others belong into the "
                "model or into outer"
            ) from error
        if has_aux != isinstance(out, tuple):
            raise TypeError(
                f"{name} returned {'a' if isinstance(out, tuple) else 'no'} tuple with has_aux="
                f"{has_aux}: a loss returns a scalar, or (scalar, aux) with has_aux=True"
            )
        value, aux = out if has_aux else (out, {})
        return value, Aux(
            moved(inside.rest, module), aux if isinstance(aux, Mapping) else {"aux": aux}
        )

    def stateless(loss, name, train):
        return lambda z, x, batch: call(loss, name, train, z, x, batch)[0]

    def with_state(loss, name, train):
        return lambda z, x, batch, model_state, rng: call(
            loss, name, train, z, x, batch, model_state, rng
        )

    make = with_state if stateful else stateless
    return Problem(
        make(inner_loss, "inner_loss", True),
        make(outer_loss, "outer_loss", False),
        stateful=stateful,
        per_sample=per_sample,
        **settings,
    )


def _parameters(loss: Callable) -> Mapping[str, Any]:
    try:
        return inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a builtin, or no function at all: `Problem` says so
        return {}
