"""What an example hands to the training loop: a problem, its data, and what to report."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_flax import deprecated
from bilevel_flax.base import Problem, PyTree, TrainState
from bilevel_flax.checks import UserError
from bilevel_flax.data import FiniteSum


class InitialValues(NamedTuple):
    """Where a run starts.

    Attributes:
        inner_params: z.
        outer_params: x.
        model_state: mutable state, or None.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel_flax.train.task import InitialValues
        >>> InitialValues(jnp.zeros(3), jnp.array(-2.0)).model_state is None
        True
    """

    inner_params: PyTree
    outer_params: PyTree
    model_state: PyTree = None


def no_values(state: TrainState) -> Mapping[str, float]:
    """Evaluates nothing."""
    del state
    return {}


def no_final_metrics(
    state: TrainState, workdir: Path, log: Callable[[str], None]
) -> Mapping[str, Any]:
    """Adds nothing to the summary."""
    del state, workdir, log
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A bilevel problem on real data; how to write one: docs/loops.md.

    Attributes:
        problem: G and F.
        init: `init(rng) -> InitialValues`.
        inner: the inner data.
        outer: the outer data.
        evaluate: `evaluate(state)`, at every `eval_every` steps: a dict of numbers by name, or a
            `clu.metrics.Collection`. It must not look at test data. Names that begin with "_" go
            to the files alone, for a report of the task's own: they are neither printed nor drawn
            among the curves.
        final_metrics: `final_metrics(state, workdir, log) -> {name: value}`, once, after the last
            step: what else belongs into `summary.json` (final errors, baselines). It may write
            files into the workdir; what takes long is stored there as it comes, so that a killed
            run goes on. `log` prints a line.
        held_out: data of F's kind that F never sees: a loss there well above F's own says that x
            memorises the outer data; None: not watched.
        best_metric: the name of a value of `evaluate` that should be low: `final_metrics` is then
            handed the network (z and the model state) from the evaluation where it was lowest, with
            the last v and x; None: the last network.
        headline: names in the summary, in the order in which a person wants to read them: printed
            at the end of a run, and the report's cards. A dot leads into a mapping: `"test.soba"`.
        rules: on a mesh, which axes of z's leaves are cut, as for `sharding.state_shardings`.
        units: what the values of `evaluate` and `final_metrics` are measured in, by name:
            "fraction" (a number in [0, 1], shown in percent), "count", "seconds", or any text to
            stand behind the number ("nats"). A name without one is shown as it is; the name of a
            family, what precedes a slash or a dot, stands for its members.
        paired: G and F come with minibatches of the same number in every update, where F is to see
            the examples (or tasks) whose part of z has just been solved for. False: independent.
        domains: names of the domains that `batch["domain"]` of the inner minibatches counts. One
            that none of them holds is named in a warning, again and again while the run goes on
            (data that are read on demand are not looked through).

    Example:
        >>> import numpy as np, jax.numpy as jnp, bilevel_flax as bf
        >>> from bilevel_flax.train.task import InitialValues, Task
        >>> loss = lambda z, x, batch: jnp.mean((z - x * batch["a"]) ** 2)
        >>> examples = bf.data.partition({"a": np.ones(8, np.float32)}, 4)
        >>> task = Task(
        ...     problem=bf.Problem(loss, loss),
        ...     init=lambda rng: InitialValues(jnp.zeros(()), jnp.ones(())),
        ...     inner=examples,
        ...     outer=examples,
        ... )
    """

    problem: Problem
    init: Callable[[jax.Array], InitialValues]
    inner: FiniteSum
    outer: FiniteSum
    evaluate: Callable[[TrainState], Mapping[str, float]] = no_values
    final_metrics: Callable[[TrainState, Path, Callable[[str], None]], Mapping[str, Any]] = (
        no_final_metrics
    )
    held_out: FiniteSum | None = None
    best_metric: str | None = None
    headline: Sequence[str] = ()
    rules: Any = None
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paired: bool = False
    domains: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("inner", "outer", "held_out"):
            side = getattr(self, name)
            if not isinstance(side, FiniteSum) and (name, side) != ("held_out", None):
                raise UserError(
                    f"{name} of the task is a {type(side).__name__}, but must be minibatches: "
                    "bf.data.partition(arrays, batch_size)"
                )
        for name, arguments in _CALLED_WITH.items():
            _check_function(name, getattr(self, name), arguments)
        for name in ("headline", "domains"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"{name}={getattr(self, name)!r} must be a list of names")
        if not isinstance(self.units, Mapping):
            raise UserError(
                f'units={self.units!r:.40} must be a dict, name -> unit, such as "nats"'
            )
        wrong = {name: unit for name, unit in self.units.items() if not isinstance(unit, str)}
        if wrong:
            name, unit = next(iter(wrong.items()))
            raise UserError(f'units: {name!r} has the unit {unit!r}; write a text, such as "nats"')

    def start(self, rng: jax.Array) -> InitialValues:
        """What `init` returns.

        Raises:
            UserError: it is no `InitialValues`.
        """
        values = self.init(rng)
        if not isinstance(values, InitialValues):
            raise UserError(
                f"init of the task returned a {type(values).__name__}; return "
                "InitialValues(inner_params, outer_params)"
            )
        return values

    def conclusion(
        self, state: TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        """What `final_metrics` returns, arrays as lists.

        Raises:
            UserError: it is no dict of what JSON holds.
        """
        values = self.final_metrics(state, workdir, log)
        if not isinstance(values, Mapping):
            raise UserError(f"final_metrics returned {values!r:.40}; return a dict by name")
        return _plain("final_metrics", values)


_CALLED_WITH = {
    "init": ("rng",),
    "evaluate": ("state",),
    "final_metrics": ("state", "workdir", "log"),
}


def _check_function(name: str, function: Any, arguments: Sequence[str]) -> None:
    call = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise UserError(f"{name} of the task is {function!r:.40}; give a function, {call}")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise UserError(f"{name} of the task is called as {call}, but: {error}") from None
    except ValueError:  # nothing is known of what it takes
        return


def _plain(name: str, value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, str | int | float) or value is None:
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biufU":
        raise UserError(
            f"{name} is no value of JSON ({type(value).__name__}): return numbers, texts, arrays, "
            "and lists and dicts of them"
        )
    return array.tolist()


Task.__init__ = deprecated.renamed_arguments(finish="final_metrics", select="best_metric")(
    Task.__init__
)
__getattr__ = deprecated.names(__name__)
