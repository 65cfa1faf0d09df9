"""Checkpoints from a loop of your own, in one line each; a part of one; a warm start from one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from bilevel_flax.base import BilevelSolver, TrainState
from bilevel_flax.checkpoints import arrays_file
from bilevel_flax.checkpoints.checkpointer import Checkpointer, Restored
from bilevel_flax.checkpoints.errors import CheckpointError, Damaged
from bilevel_flax.checkpoints.processes import Processes
from bilevel_flax.checkpoints.template import Template

_Path = str | os.PathLike[str]


def save(
    directory: _Path,
    step: int,
    state: Any,
    meta: Mapping[str, Any] | None = None,
    *,
    keep: int = 3,
    processes: Processes | None = None,
) -> None:
    """Saves a state, and returns when it is on the disk.

    To go on training while it is written, use a `Checkpointer`.

    Args:
        directory: of all checkpoints of the run; made if it does not exist.
        step: the step that the state has reached; above that of every checkpoint there is.
        state: a `TrainState` of any solver, or any other pytree of arrays.
        meta: anything that JSON holds: config, data position.
        keep: how many checkpoints to keep, the newest.
        processes: how the processes talk to each other, where there are several.

    Raises:
        CheckpointError: it could not be saved.
        TypeError: a leaf of the state is not an array, or `meta` is not JSON.
        ValueError: `step` is not above the latest, or a leaf has been donated.

    Example:
        >>> import bilevel_flax as bf, jax.numpy as jnp, tempfile
        >>> directory = tempfile.mkdtemp()
        >>> bf.checkpoints.save(directory, 7, {"w": jnp.ones(2)})
        >>> bf.checkpoints.latest_step(directory)
        7
        >>> bf.checkpoints.restore(directory, {"w": jnp.zeros(2)})["w"].tolist()
        [1.0, 1.0]
    """
    with Checkpointer(directory, keep=keep, asynchronous=False, processes=processes) as saver:
        saver.save(step, state, meta)


def latest_step(directory: _Path) -> int | None:
    """The newest step that has a checkpoint; None without any.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state, directory = solver.init(jnp.array(0.5), jnp.array(2.0)), tempfile.mkdtemp()
        >>> bf.checkpoints.latest_step(directory) is None
        True
        >>> bf.checkpoints.save(directory, 3, state)
        >>> bf.checkpoints.latest_step(directory)
        3
    """
    return Checkpointer(directory, read_only=True).latest_step()


def restore(
    directory: _Path,
    like_state: Any,
    *,
    step: int | None = None,
    processes: Processes | None = None,
) -> Any:
    """The newest sound checkpoint's state, bit for bit.

    Args:
        directory: of all checkpoints of the run.
        like_state: a state of the same structure (`solver.init(...)`), of arrays or
            `jax.ShapeDtypeStruct`; it gives structure, dtypes and shardings.
        step: only this step, without falling back over damaged ones.
        processes: how the processes talk to each other, where there are several.

    Returns:
        The state; see `save` for an example.

    Raises:
        CheckpointError: there is no sound checkpoint.
        CheckpointMismatch: it is another model's or solver's; the first differing leaf is named.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state, directory = solver.init(jnp.array(0.5), jnp.array(2.0)), tempfile.mkdtemp()
        >>> bf.checkpoints.save(directory, 3, state)
        >>> fresh = solver.init(jnp.array(0.0), jnp.array(0.0))
        >>> float(bf.checkpoints.restore(directory, fresh).outer_params)
        2.0
    """
    with Checkpointer(directory, read_only=True, processes=processes) as checkpointer:
        return _required(directory, checkpointer.restore(like_state, step)).state


def restore_parts(
    directory: _Path, parts: Mapping[str, Any], *, step: int | None = None
) -> dict[str, Any]:
    """Some fields of a checkpoint's state; the solver that wrote it does not matter.

    Args:
        directory: of all checkpoints of a run, or the `network.npz` of a run that ended.
        parts: names of fields (`inner_params`, `outer_params`, `model_state`, ...), each with a
            tree of the same structure, or None: nested dicts come back, keyed as the tree was.
        step: only this step, without falling back over damaged ones.

    Returns:
        The parts, by name.

    Raises:
        CheckpointError: there is no sound checkpoint.
        CheckpointMismatch: it has no such part, or one of another structure.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state, directory = solver.init(jnp.array(0.5), jnp.array(2.0)), tempfile.mkdtemp()
        >>> bf.checkpoints.save(directory, 3, state)
        >>> parts = bf.checkpoints.restore_parts(directory, {"outer_params": state.outer_params})
        >>> float(parts["outer_params"])
        2.0
    """
    if os.fspath(directory).endswith(".npz"):
        try:
            return arrays_file.restore(Path(directory), Template(parts, in_parts=True))[0]
        except Damaged as error:
            raise CheckpointError(str(error)) from error
    with Checkpointer(directory, read_only=True) as checkpointer:
        return _required(directory, checkpointer.restore_parts(parts, step)).state


def restore_inner(directory: _Path, like: Any = None, *, step: int | None = None) -> Any:
    """The network alone: a checkpoint's z.

    Args:
        directory: of all checkpoints of a run, or the `network.npz` of a run that ended.
        like: parameters of the same structure; None: nested dicts, as Flax has them.
        step: only this step, without falling back over damaged ones.

    Returns:
        The parameters, verified. Running statistics: `restore_parts`, "model_state".

    Raises:
        CheckpointError: there is no sound checkpoint.
        CheckpointMismatch: z has another structure than `like`.

    Example:
        >>> import bilevel_flax as bf, jax.numpy as jnp, optax, tempfile
        >>> problem = bf.Problem(lambda z, x, batch: ((z["w"] - x) ** 2).sum(),
        ...                      lambda z, x, batch: ((z["w"] - 3) ** 2).sum())
        >>> solver = bf.soba(problem, inner=optax.adam(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init({"w": jnp.ones(2)}, jnp.float32(0.5))
        >>> directory = tempfile.mkdtemp()
        >>> bf.checkpoints.save(directory, 0, state)
        >>> bf.checkpoints.restore_inner(directory)
        {'w': Array([1., 1.], dtype=float32)}
    """
    return restore_parts(directory, {"inner_params": like}, step=step)["inner_params"]


def warm_start(
    directory: _Path,
    solver: BilevelSolver,
    inner_params: Any,
    outer_params: Any,
    *,
    model_state: Any = None,
    rng: jax.Array | None = None,
    step: int | None = None,
) -> TrainState:
    """As `solver.init`, with z, x and the model's state taken from a checkpoint.

    The checkpoint may be another solver's, with other optimisers: they, v and the estimator's
    memory start afresh, at step 0.

    Args:
        directory: of all checkpoints of a run.
        solver: whose state it will be.
        inner_params: z of the same structure, as `solver.init` takes it; its values do not matter.
        outer_params: x, likewise.
        model_state: the model's state, likewise.
        rng: as `solver.init` takes it.
        step: only this step, without falling back over damaged ones.

    Raises:
        CheckpointError: there is no sound checkpoint.
        CheckpointMismatch: z or x has another structure; the first differing leaf is named.

    Example:
        >>> import bilevel_flax as bf, jax.numpy as jnp, optax, tempfile
        >>> problem = bf.Problem(lambda z, x, batch: ((z["w"] - x) ** 2).sum(),
        ...                      lambda z, x, batch: ((z["w"] - 3) ** 2).sum())
        >>> z, x, directory = {"w": jnp.ones(2)}, jnp.float32(0.5), tempfile.mkdtemp()
        >>> first = bf.soba(problem, inner=optax.adam(0.1), outer=optax.sgd(0.1))
        >>> bf.checkpoints.save(directory, 0, first.init(z, x))
        >>> second = bf.storm(problem, inner=optax.sgd(0.1), outer=optax.adam(0.01))
        >>> z, x = {"w": jnp.zeros(2)}, jnp.float32(0)
        >>> state = bf.checkpoints.warm_start(directory, second, z, x)
        >>> state.inner_params["w"].tolist(), float(state.outer_params)
        ([1.0, 1.0], 0.5)
    """
    parts = {"inner_params": inner_params, "outer_params": outer_params}
    if jax.tree_util.tree_leaves(model_state):
        parts["model_state"] = model_state
    taken = {"model_state": model_state, **restore_parts(directory, parts, step=step)}
    return solver.init(
        taken["inner_params"], taken["outer_params"], model_state=taken["model_state"], rng=rng
    )


def _required(directory: _Path, restored: Restored | None) -> Restored:
    if restored is None:
        raise CheckpointError(
            f"directory={os.fspath(directory)!r}: there is no checkpoint; give the folder that "
            "holds those of a run (`latest_step` tells whether there are any)."
        )
    return restored
