"""The oracles of a step on many devices, with one reduction at the end.

Left alone, XLA's partitioner reduces every backprop where it ends: twice for the
Hessian-vector product, and once for each of the gradients, 3.9 times the parameters' bytes in all.
But whatever a method needs is linear in the losses. So each device computes on its share of the
minibatch, the directions are put together there, and what is reduced is (D_z, D_v, D_x): twice the
parameters' bytes, in one phase. Methods with a memory get the oracles themselves, three times.

With fsdp > 1, z and v are gathered once (by parameters and tangents together), and the sums are
scattered to the devices that keep the part in question.

Only this runs inside `jax.shard_map`. Optimisers, tables and norms follow outside of it, on global
arrays, so that any Optax transformation gives what it gives on one device.

A share's losses are means over its own examples; the whole's are means of these, weighted by the
number of real examples (`minibatches.example_mask`). That needs losses that are means over examples
plus terms without any: see `decomposition` for a check, `BATCH_AXES` for BatchNorm's `axis_name`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Rows, Variables
from bilevel_flax.base.problem import check_problem
from bilevel_flax.oracles.microbatches import check_scalars
from bilevel_flax.oracles.weighted_sums import amount
from bilevel_flax.sharding.mesh import BATCH_AXES, batch_share
from bilevel_flax.sharding.named_axes import whole
from bilevel_flax.sharding.reduction import reduced, taken_apart, whole_leaves
from bilevel_flax.sharding.rules import param_specs
from bilevel_flax.sharding.sketch import sketch
from bilevel_flax.sharding.state import batch_spec
from bilevel_flax.tree import is_inexact, norm, plus_decay, ratio

_NOTHING = Oracles(*(None,) * 5)
_EVERYWHERE = PartitionSpec()
_BY_EXAMPLE = PartitionSpec(BATCH_AXES)


def data_parallel(problem: Problem, mesh: Mesh, rules: Any = None) -> Problem:
    """The problem with its oracles computed in shares of the minibatch, reduced once.

    Make the solver from what this returns. Its `init` and `update` are then to be jitted with
    the shardings of `state_shardings` and `batch_shardings`.

    Args:
        problem: whose losses are means over the examples of a minibatch, beside terms without
            examples (penalties). BatchNorm needs `axis_name=BATCH_AXES` in the model, and then
            normalises by the statistics of the whole minibatch. Losses of this kind may be
            evaluated outside of the step as well: there the axes have one member.
        mesh: from `make_mesh`, tensor = 1.
        rules: as for `state_shardings`.

    Returns:
        A problem for `soba`, `saba`, `srba`, `auto` ... on that mesh. Nested methods, and
        `saba(memory="compact")`, evaluate it as any other problem on global arrays.

    Raises:
        ValueError: the mesh has tensor > 1, or other axes than those of `make_mesh`; at trace time,
            a loss is a sum over the minibatch, or a mean over something else than examples.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: jnp.mean((z - x * batch) ** 2),
        ...     outer_loss=lambda z, x, batch: jnp.mean((z - batch) ** 2),
        ... )
        >>> mesh = bf.sharding.make_mesh("data=1", jax.devices()[:1])
        >>> problem = bf.sharding.data_parallel(problem, mesh)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.zeros(()), jnp.ones(()))
        >>> state, info = jax.jit(solver.update)(state, bf.Batch(jnp.ones(4), jnp.ones(4)))
        >>> round(float(state.inner_params), 2)
        0.2
    """
    check_problem(problem)
    if missing := [name for name in (*BATCH_AXES, "tensor") if name not in mesh.shape]:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}, but data_parallel needs {missing} as well: take "
            'one of bf.sharding.make_mesh("data=4"), or leave a mesh of your own to XLA, '
            "bf.sharding.state_shardings(state, mesh, shardings of z, problem)"
        )
    if mesh.shape["tensor"] > 1:
        raise ValueError(
            f"data_parallel takes no mesh with tensor={mesh.shape['tensor']}: tensor parallelism "
            "is left to XLA's partitioner; use the problem as it is"
        )
    axes = tuple(name for name in BATCH_AXES if mesh.shape[name] > 1)

    def evaluate(shared, points, combine):
        return _evaluate(mesh, axes, rules, shared, points, combine)

    return dataclasses.replace(whole(problem), evaluate=evaluate)


def _evaluate(
    mesh: Mesh,
    axes: tuple[str, ...],
    rules: Any,
    shared: oracles.Shared,
    points: Sequence[Variables],
    combine: Callable[..., Variables] | None,
) -> oracles.Evaluation:
    """The evaluation at the first point, with `combine` of the oracles at them all.

    Where there is a `combine`, the oracles themselves are None: only what it makes is added up, and
    the lengths of ∇₁F, Hv and ∇²₂₁G v come from sketches.
    """
    problem, batch = shared.problem, shared.batch
    z = points[0].inner
    like_z = jax.tree.leaves(param_specs(z, mesh, rules))
    specs = jax.tree.unflatten(jax.tree.structure(z), like_z)
    # Per-sample leaves: the minibatch's rows go in, and its rows come out.
    flags = rows.map_prefix(problem.per_sample, lambda _: True, lambda _: False, points[0].outer)
    x_specs = jax.tree.map(lambda flag: _BY_EXAMPLE if flag else _EVERYWHERE, flags)
    gathered = [
        point._replace(outer=_rows_of(problem, point.outer, batch, mesh)) for point in points
    ]
    data = {"inner": batch.inner, "outer": batch.outer}
    data_specs = jax.tree.map_with_path(
        lambda path, leaf: batch_spec(jax.tree_util.keystr(path), leaf.shape, mesh), data
    )
    by_row = rows.has_rows(problem.per_sample) and batch.inner is not None
    labels, counts = _labels(problem, points[0].outer, gathered[0].outer, batch, by_row)
    shape = {}

    def on_share(points, data, labels, model_state, rngs):
        points = [
            Variables(
                whole_leaves(point.inner, like_z), whole_leaves(point.adjoint, like_z), point.outer
            )
            for point in points
        ]
        data = dict(data)
        if by_row:
            count = data["inner"]["index"].shape[0]
            data["inner"] = {**data["inner"], "index": jnp.arange(count, dtype=jnp.int32)}
        part = Batch(data["inner"], data["outer"])
        if axes:
            rngs = jax.tree.map(lambda key: jax.random.fold_in(key, lax.axis_index(axes)), rngs)
        real = {
            side: _share(problem, side, points[0], data[side], (model_state, rng), axes, mesh)
            for side, rng in zip(("inner", "outer"), rngs, strict=True)
        }
        several = [
            _weighted(_labelled(evaluation, labels, counts), problem, real)
            for point in points
            for evaluation in [shared.evaluate(problem, point, part, model_state, rngs)]
        ]
        evaluation, sketches = several[0], None
        if combine is not None:
            _, hvp, cross, grad, _ = evaluation.oracles
            dense = rows.dense_leaves(cross)
            sketches = _Sketches(cross=sketch(dense) if dense and len(points) == 1 else None)
            if hvp is not None:
                # Not Hv as the rest of D_v: v starts so small that ∇₁F leaves no digit of it.
                coarser = 1 if len(points) > 1 else 2  # of one point its length alone is asked
                sketches = sketches._replace(hvp=sketch(hvp, coarser), grad=sketch(grad))
                if shared.decay is not None and len(points) > 1:
                    each = jax.tree.map(lambda rate: rate / batch_share(mesh), shared.decay)
                    nothing = jax.tree.map(jnp.zeros_like, hvp)
                    along_v = sketch(plus_decay(nothing, each, points[0].adjoint))
                    sketches = sketches._replace(decay=along_v)
            evaluation = evaluation._replace(
                directions=combine(*(each.oracles for each in several)), oracles=_NOTHING
            )
        parts, shape["join"] = taken_apart((evaluation, sketches), jax.tree.structure(z))
        return parts | reduced(parts, like_z, axes)

    out_specs = {"like_z": like_z, "by_row": _BY_EXAMPLE, "rest": _EVERYWHERE}
    point_specs = [Variables(specs, specs, x_specs) for _ in points]
    parts = jax.shard_map(
        on_share,
        mesh=mesh,
        in_specs=(point_specs, data_specs, _BY_EXAMPLE, _EVERYWHERE, _EVERYWHERE),
        out_specs=out_specs,
        check_vma=False,
    )(gathered, data, labels, shared.model_state, shared.rngs)
    evaluation, sketches = shape["join"](parts)
    if sketches is None:
        return evaluation
    hvp, grad, cross, decay = sketches
    if cross is not None:
        whole = norm(rows.dense_leaves(evaluation.directions.outer))
        evaluation = evaluation._replace(through_inner=ratio(norm(cross), whole))
    if grad is None:
        return evaluation
    d_v = evaluation.directions.adjoint
    if len(points) > 1:
        length = norm(hvp + grad + (0.0 if decay is None else decay))
    else:
        length = norm(plus_decay(d_v, shared.decay, points[0].adjoint))
    return evaluation._replace(residual=ratio(length, norm(grad)), product=norm(hvp))


class _Sketches(NamedTuple):
    """Of what is not reduced whole; None: not evaluated, or not asked for."""

    hvp: jax.Array | None = None
    grad: jax.Array | None = None  # ∇₁F
    cross: jax.Array | None = None
    decay: jax.Array | None = None  # of the decay's pull on v, where D_v is a difference


def _rows_of(problem: Problem, x: PyTree, batch: Batch, mesh: Mesh) -> PyTree:
    """X with the minibatch's rows of each per-sample leaf; F alone sees none of them."""
    if batch.inner is not None:
        return rows.gather(problem.per_sample, x, batch.inner)
    none = lambda leaf: jnp.zeros((batch_share(mesh), *leaf.shape[1:]), leaf.dtype)
    return rows.map_prefix(problem.per_sample, none, lambda leaf: leaf, x)


def _labels(problem: Problem, x: PyTree, gathered: PyTree, batch: Batch, by_row: bool):
    """For each leaf of x the rows of the minibatch's examples, and how many there are in all."""
    flat = jax.tree.leaves(x)
    if not by_row:
        return [None] * len(flat), [0] * len(flat)
    nodes = jax.tree.leaves(
        rows.wrap(problem.per_sample, gathered, x, batch.inner), is_leaf=rows.is_rows
    )
    labels = [node.index if rows.is_rows(node) else None for node in nodes]
    return labels, [leaf.shape[0] if leaf.ndim else 0 for leaf in flat]


def _labelled(evaluation: Any, labels: list, counts: list) -> Any:
    """The evaluation with `Rows` of the examples of a share as `Rows` of all samples."""
    if evaluation.oracles.cross_jvp is None:
        return evaluation
    nodes, treedef = jax.tree.flatten(evaluation.oracles.cross_jvp, is_leaf=rows.is_rows)
    for i, (node, label, count) in enumerate(zip(nodes, labels, counts, strict=True)):
        if rows.is_rows(node):
            index = label.at[node.index].get(mode="fill", fill_value=count)
            nodes[i] = Rows(index, node.values)
    cross = treedef.unflatten(nodes)
    return evaluation._replace(oracles=evaluation.oracles._replace(cross_jvp=cross))


def _share(
    problem: Problem,
    side: str,
    point: Variables,
    part: PyTree,
    context: tuple,
    axes: tuple[str, ...],
    mesh: Mesh,
) -> Any:
    """This device's share of what counts; a number where all parts count alike."""
    if not axes or part is None:
        return 1.0
    mine = amount(problem, f"{side}_loss", point[::2], part, context, "data_parallel")
    if mine is not None:
        total = lax.psum(mine, axes)
        return mine / jnp.where(total > 0, total, 1)
    return 1.0 / batch_share(mesh)


def _times(tree: PyTree, share: Any) -> PyTree:
    def scaled(leaf):
        if not is_inexact(leaf):
            return leaf
        out = leaf * jnp.asarray(share, leaf.dtype)
        # A share of padding alone has no say, not even that of a mean over nothing.
        return out if isinstance(share, float) else jnp.where(share > 0, out, 0)

    return jax.tree.map(scaled, tree)


def _weighted(evaluation: Any, problem: Problem, real: dict[str, Any]) -> Any:
    """An evaluation on a share, times the share: what is left to do is to add up."""
    inner, outer = real["inner"], real["outer"]
    values = evaluation.oracles
    moved = outer if problem.outer_updates_state else inner
    check_scalars(evaluation.metrics, "data_parallel")
    metrics = {
        name: _times(jnp.asarray(value, jnp.result_type(value, jnp.float32)), real[name[:5]])
        for name, value in evaluation.metrics.items()
    }
    return evaluation._replace(
        oracles=Oracles(
            _times(values.inner_grad, inner),
            _times(values.hvp, inner),
            _times(values.cross_jvp, inner),
            _times(values.outer_grad_inner, outer),
            _times(values.outer_grad_outer, outer),
        ),
        inner_loss=_times(evaluation.inner_loss, inner),
        outer_loss=_times(evaluation.outer_loss, outer),
        model_state=_times(evaluation.model_state, moved) if problem.stateful else None,
        metrics=metrics,
    )
