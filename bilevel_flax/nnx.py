"""NNX modules in, modules out: losses that take `flax.nnx` modules, and an optimiser for them.

The solvers know pytrees of arrays only. So a module is split: z is a plain dict of its Params,
BatchNorm's statistics and all other variables become the model state, and dropout's streams are
seeded anew in every step from the solver's own key, so that a checkpoint of the `TrainState` holds
everything. Inside the loss the module is put together again, a fresh copy in each evaluation: the
gradient and the Hessian-vector product see one draw of dropout, and BatchNorm moves once a step.
A Param in two places is one leaf of z.

Reference:
    Flax NNX, https://flax.readthedocs.io (the functional API: split, merge, state).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bilevel_flax.base import Aux, Batch, BilevelSolver, Info, Problem, PyTree, TrainState


class _Template(NamedTuple):
    """What is left of a module when its arrays are taken out, and how to put them back."""

    graphdef: Any
    learned: nnx.State  # what z or x is made of
    rest: nnx.State  # mutable: BatchNorm's statistics, parameters held fixed, counters
    streams: nnx.State  # dropout's keys and counters

    def module(self, params: PyTree, rest: PyTree, rng: jax.Array | None) -> Any:
        """A new module around these arrays."""
        states = (_filled(self.learned, params), _filled(self.rest, rest))
        # Without the copy, what the loss does to the module would leak out of its trace.
        return nnx.merge(self.graphdef, *states, _seeded(self.streams, rng), copy=True)


def _is_module(node: Any) -> bool:
    return isinstance(node, nnx.Pytree)


def _template(module: Any, wrt: Any) -> _Template:
    graphdef, learned, streams, rest = nnx.split(module, wrt, nnx.RngState, ...)
    return _Template(graphdef, learned, rest, streams)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _paths(state: nnx.State) -> dict[tuple, Any]:
    return dict(nnx.to_flat_state(state))


def _plain(state: nnx.State) -> dict:
    """The arrays of a State in plain nested dicts."""
    tree: dict = {}
    for path, leaf in _paths(state).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _value(leaf)
    return tree


def _filled(template: nnx.State, values: PyTree) -> nnx.State:
    """The State with other arrays, from plain nested dicts."""

    def at(path):
        node = values
        for key in path:
            node = node[key]
        return node

    flat = [(path, _with_value(leaf, at(path))) for path, leaf in _paths(template).items()]
    return nnx.from_flat_state(flat)


def _seeded(streams: nnx.State, rng: jax.Array | None) -> nnx.State:
    """The random streams with new keys drawn from `rng`, their counters as they were."""
    if rng is None:
        return streams
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    run_key = rng if typed else jax.random.wrap_key_data(rng)
    flat = []
    for position, (path, leaf) in enumerate(_paths(streams).items()):
        value = _value(leaf)
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            key = jax.random.fold_in(run_key, position)
            # Streams of layers made under vmap are arrays of keys.
            value = jax.random.split(key, value.shape) if value.shape else key
        flat.append((path, _with_value(leaf, value)))
    return nnx.from_flat_state(flat)


def _check_model(model: Any, wrt: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, got {type(model).__name__}: linen modules and plain "
            "functions go to bf.Problem(inner_loss, outer_loss)"
        )
    if not _paths(nnx.state(model, wrt)):
        found = sorted({type(leaf).__name__ for leaf in _paths(nnx.state(model)).values()})
        raise ValueError(
            f"{type(model).__name__} has no variable that wrt={wrt!r} selects, so there is "
            f"nothing to learn; it has {', '.join(found) or 'no variables at all'}"
        )


def _check_fits(name: str, params: PyTree, template: nnx.State, owner: str) -> None:
    expected = jax.tree.structure(_plain(template))
    if jax.tree.structure(params) != expected:
        raise ValueError(
            f"{name} does not fit the {owner} that bf.nnx.problem was given: "
            f"{jax.tree.structure(params)} against {expected}; make the state with "
            "bf.nnx.init(solver, model, outer) or bf.nnx.Optimizer, with the same wrt"
        )


def _map_modules(function: Callable, other: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps the modules of a tree one way and its remaining leaves another."""

    def apply(node, *others):
        return function(node, *others) if _is_module(node) else other(node, *others)

    return jax.tree.map(apply, tree, *rest, is_leaf=_is_module)


def problem(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    model: nnx.Module,
    outer: PyTree,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    per_sample: PyTree = None,
    derivatives: str = "forward_over_reverse",
    remat: bool = False,
) -> Problem:
    """A bilevel problem whose losses take NNX modules.

    Args:
        inner_loss: G, `loss(model, outer, batch) -> scalar`, the mean over the minibatch. It is
            handed the module in train mode (`model.train()`).
        outer_loss: F, of the same form, in evaluation mode (`model.eval()`). What it does to the
            module's variables is dropped.
        model: the module that is trained; only its structure is kept, so any one of the same
            architecture serves.
        outer: x: arrays, modules (e.g. a network that gives weights), or a pytree of both. The
            losses see modules where there are modules here.
        wrt: which variables of `model` are z, as for `nnx.Optimizer`. The others are constants,
            as far as the loss leaves them alone.
        has_aux: the losses return `(scalar, metrics)`, a dict of scalars to log.
        per_sample: as for `Problem`.
        derivatives: as for `Problem`.
        remat: as for `Problem`.

    Returns:
        A `Problem` for any solver. It is stateful exactly if the module has other variables than
        z (BatchNorm, dropout), or `has_aux`. Make its state by `init` or `Optimizer`.

    Raises:
        TypeError: `model` is no `nnx.Module`; at trace time a loss returns something else.
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
    _check_model(model, wrt)
    inside = _template(model, wrt)
    outside = _map_modules(lambda node: _template(node, nnx.Param), lambda leaf: leaf, outer)
    modules = [t for t in jax.tree.leaves(outside, is_leaf=_is_template) if _is_template(t)]
    random = inside.streams, *(t.streams for t in modules)
    stateful = has_aux or bool(inside.rest) or any(bool(streams) for streams in random)

    def rebuilt_outer(x, rng):
        def rebuild(template, node):
            if not _is_template(template):
                return node
            _check_fits("outer_params", node, template.learned, "outer module")
            return template.module(node, _plain(template.rest), rng)

        return jax.tree.map(rebuild, outside, x, is_leaf=_is_template)

    def call(loss, name, train, z, x, batch, model_state=None, rng=None):
        _check_fits("inner_params", z, inside.learned, "model")
        rest = _plain(inside.rest) if model_state is None else model_state
        if inside.rest:
            _check_fits("model_state", rest, inside.rest, "model")
        module = inside.module(z, rest, rng)
        module.train() if train else module.eval()
        out = loss(module, rebuilt_outer(x, rng), batch)
        if has_aux != isinstance(out, tuple):
            raise TypeError(
                f"{name} returned {'a' if isinstance(out, tuple) else 'no'} tuple with has_aux="
                f"{has_aux}: a loss returns a scalar, or (scalar, metrics) with has_aux=True"
            )
        value, metrics = out if has_aux else (out, {})
        return value, Aux(_moved(inside.rest, module), metrics)

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
        derivatives=derivatives,
        remat=remat,
    )


def _is_template(node: Any) -> bool:
    return isinstance(node, _Template)


def _moved(rest: nnx.State, module: nnx.Module) -> dict:
    """The mutable variables after a call; new ones (sown intermediates) are not kept."""
    now = _paths(nnx.state(module))
    known = [(path, _with_value(leaf, _value(now[path]))) for path, leaf in _paths(rest).items()]
    return _plain(nnx.from_flat_state(known))


def params(tree: PyTree, *, wrt: Any = nnx.Param) -> PyTree:
    """A tree's modules as plain nested dicts of their Params, its other leaves as they are.

    Args:
        tree: a module, arrays, or a pytree of both.
        wrt: which variables.
    """
    return _map_modules(lambda node: _plain(nnx.state(node, wrt)), lambda leaf: leaf, tree)


def init(
    solver: BilevelSolver,
    model: nnx.Module,
    outer: PyTree,
    *,
    wrt: Any = nnx.Param,
    rng: jax.Array | None = None,
) -> TrainState:
    """A fresh `TrainState` for a `problem`, with the module's present values.

    Args:
        solver: any solver of the problem.
        model: the module to start from.
        outer: x to start from, arrays and modules as given to `problem`.
        wrt: as given to `problem`.
        rng: key of the run: dropout draws from it. None: a fixed one.

    Raises:
        TypeError: `model` is no `nnx.Module`.
        ValueError: there is nothing to learn in `model`.
    """
    _check_model(model, wrt)
    rest = _plain(_template(model, wrt).rest)
    return solver.init(params(model, wrt=wrt), params(outer), model_state=rest or None, rng=rng)


def write(state: TrainState, model: nnx.Module, outer: PyTree = None, *, wrt: Any = nnx.Param):
    """Writes a state's arrays into the modules, in place.

    Args:
        state: what to write.
        model: takes z and the model state.
        outer: modules in it take their part of x; arrays in it stay (see the return value).
        wrt: as given to `problem`.

    Returns:
        x, with the modules of `outer` in it; all of x if `outer` is None.
    """
    template = _template(model, wrt)
    nnx.update(model, _filled(template.learned, state.inner_params))
    if state.model_state:
        nnx.update(model, _filled(template.rest, state.model_state))
    if outer is None:
        return state.outer_params

    def into(module, values):
        nnx.update(module, _filled(nnx.state(module, nnx.Param), values))
        return module

    return _map_modules(into, lambda _, value: value, outer, state.outer_params)


class OptimizerArray(nnx.Variable):
    """An array of the solver's state inside an `Optimizer`."""


class OuterParam(nnx.Variable):
    """An array of x inside an `Optimizer`."""


class Optimizer(nnx.Pytree):
    """A bilevel solver in the place of `nnx.Optimizer`.

    Hand it to `nnx.jit` together with the module, as an `nnx.Optimizer`:
    `info = optimizer.update(model, bf.Batch(train_batch, validation_batch))`. The module is changed
    in place, and so are modules in `outer`. z lives in the module, everything else here;
    `nnx.jit(..., donate_argnums=...)` saves the second copy.

    Args:
        model: the module to train.
        solver: any solver of a `problem`, e.g. `bf.auto(problem, inner=optax.adamw(1e-3), ...)`.
        outer: x, as given to `problem`.
        wrt: as given to `problem`.
        rng: key of the run; None: a fixed one.

    Raises:
        TypeError: `model` is no `nnx.Module`, `solver` no solver.
        ValueError: there is nothing to learn in `model`.
    """

    def __init__(
        self,
        model: nnx.Module,
        solver: BilevelSolver,
        outer: PyTree,
        *,
        wrt: Any = nnx.Param,
        rng: jax.Array | None = None,
    ):
        if not isinstance(solver, BilevelSolver):
            raise TypeError(
                f"solver must be a BilevelSolver, got {type(solver).__name__}: Optimizer(model, "
                "bf.auto(bf.nnx.problem(...), inner=optax.adamw(1e-3), steps=...), outer)"
            )
        state = init(solver, model, outer, wrt=wrt, rng=rng)
        self.solver = solver
        self.wrt = wrt
        self._rest = nnx.data(jax.tree.map(OptimizerArray, _without_variables(state)))
        # Modules keep their own variables, so that nnx.jit updates the user's own modules.
        self._outer = nnx.data(
            _map_modules(
                lambda node, _: node, lambda _, leaf: OuterParam(leaf), outer, state.outer_params
            )
        )

    @property
    def outer(self) -> PyTree:
        """x: arrays, and the modules that were handed in."""
        return jax.tree.map(_value, self._outer, is_leaf=_is_module_or_variable)

    @property
    def step(self) -> jax.Array:
        """int32 scalar, the updates taken so far."""
        return self._rest.step.get_value()

    def update(self, model: nnx.Module, batch: Batch) -> Info:
        """One step of the solver, written into `model` and into the modules of `outer`.

        Args:
            model: the module, as given to the constructor or of the same structure.
            batch: one training and one validation minibatch (as many as `solver.batches`).

        Raises:
            TypeError: `batch` is no `Batch`.
            ValueError: whatever the solver refuses.
        """
        if not isinstance(batch, Batch):
            raise TypeError(
                f"batch must be bf.Batch(train_batch, validation_batch), got {type(batch).__name__}"
            )
        state, info = self.solver.update(self.state(model), batch)
        self.restore(model, state)
        return info

    def state(self, model: nnx.Module) -> TrainState:
        """Everything that a checkpoint needs, as one pytree of arrays."""
        rest = jax.tree.map(_value, self._rest, is_leaf=_is_variable)
        return rest.replace(
            inner_params=params(model, wrt=self.wrt),
            outer_params=params(self.outer),
            model_state=_plain(_template(model, self.wrt).rest) or None,
        )

    def restore(self, model: nnx.Module, state: TrainState) -> None:
        """Takes up a state (from a checkpoint), in place; the opposite of `state`."""
        write(state, model, self.outer, wrt=self.wrt)
        jax.tree.map(_assign, self._rest, _without_variables(state), is_leaf=_is_variable)
        _map_modules_and_variables(self._outer, state.outer_params)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_module_or_variable(node: Any) -> bool:
    return _is_module(node) or _is_variable(node)


def _assign(variable: nnx.Variable, value: jax.Array) -> None:
    variable.set_value(value)


def _map_modules_and_variables(outer: PyTree, values: PyTree) -> None:
    def assign(node, value):
        if _is_variable(node):
            node.set_value(value)

    jax.tree.map(assign, outer, values, is_leaf=_is_module_or_variable)


def _without_variables(state: TrainState) -> TrainState:
    """The part of the state that is neither in the module nor in x."""
    return state.replace(inner_params=None, outer_params=None, model_state=None)
