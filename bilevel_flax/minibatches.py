"""Ragged minibatches: means over real examples, losses times N·w_i, w_i a minibatch's share.

Which of a minibatch's examples are real is said by `batch["example_mask"]`, or else by
`batch["mask"]` where that has one entry for each example: a mask of another shape (of tokens, of
pixels) is data of the user's own. `example_mask` alone decides, for everything in the library. Of
a minibatch with such a mask every array of that leading length holds a row for each example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import PyTree
from bilevel_flax.tree import check_gatherable, is_inexact

MASKS = ("example_mask", "mask")


def importance_factors(name: str, weights: Any) -> jax.Array | None:
    """N·w_i for each minibatch, or None for equal ones.

    Raises:
        ValueError: `weights` are no shares that sum to 1.
    """
    if weights is None:
        return None
    values = np.asarray(weights, np.float64)
    if values.ndim != 1 or not len(values) or not (values > 0).all():
        raise ValueError(
            f"{name} must be a vector of positive shares, one for each minibatch, "
            f"got shape {values.shape}: pass FiniteSum.weights"
        )
    if abs(values.sum() - 1) > 1e-4:
        raise ValueError(f"{name} must sum to 1 (shares of the samples), got {values.sum():.6g}")
    return jnp.asarray(values * len(values))


def scale(tree: PyTree, factor: Any) -> PyTree:
    """The float leaves times a scalar, in their own dtypes; None: as they are."""
    if factor is None:
        return tree

    def times(leaf):
        return leaf * jnp.asarray(factor, leaf.dtype) if is_inexact(leaf) else leaf

    return jax.tree.map(times, tree)


def entries(batch: PyTree) -> Mapping[Any, Any]:
    """What a minibatch holds, by name: of a dict, a NamedTuple or a dataclass; else nothing."""
    if isinstance(batch, Mapping):
        return batch
    fields = getattr(batch, "_fields", None) or getattr(batch, "__dataclass_fields__", ())
    return {name: getattr(batch, name) for name in fields}


def name_of(path: tuple[Any, ...]) -> Any:
    """The name of a minibatch's entry, by its path; None: it lies deeper, or has none."""
    return getattr(path[0], "key", getattr(path[0], "name", None)) if len(path) == 1 else None


def integers(batch: PyTree, name: str, needed_by: str, hint: str = "") -> jax.Array:
    """`batch[name]`, which names something for each example, e.g. its position in the data.

    Args:
        batch: a minibatch.
        name: of the entry.
        needed_by: what needs it, in the plural, for the error.
        hint: what to do where it is missing.

    Raises:
        ValueError: it is not there.
        TypeError: it is no array of integers.
    """
    named = entries(batch)
    if named.get(name) is None:
        has = sorted(map(str, named)) or type(batch).__name__
        raise ValueError(
            f'{needed_by} need batch["{name}"] (int32 [batch]); the batch has {has}{hint}'
        )
    values = jnp.asarray(named[name])
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f'batch["{name}"] must be integers, got {values.dtype}')
    return values


def example_mask(batch: PyTree, splits: str = "") -> jax.Array | None:
    """The mask of a minibatch's real examples, [batch]; None: there is none, and all are real.

    Args:
        batch: a minibatch; a NamedTuple or a dataclass has fields for a dict's entries.
            `batch["example_mask"]` is the mask if it is there (None: no mask); else
            `batch["mask"]` is, where it has the shape [batch].
        splits: what cuts the minibatch into parts that are weighted by their real examples, for
            the error. There a mask of another shape is refused: parts of a mean over tokens count
            by their tokens, parts of a mean over examples by their examples.

    Returns:
        Numbers or booleans [batch], > 0 for real examples. Where parts are weighted their sizes
        matter, so that numbers of tokens there serve losses that are means over tokens.

    Raises:
        ValueError: `batch["example_mask"]` is not [batch]; with `splits`, `batch["mask"]` is not
            and there is no `batch["example_mask"]`; a `batch["mask"]` that may or may not be one.
    """
    named = entries(batch)
    chosen = "example_mask" if "example_mask" in named else "mask"
    mask = named.get(chosen)
    if mask is None:
        return None
    others = [leaf for path, leaf in jax.tree.leaves_with_path(batch) if name_of(path) not in MASKS]
    others = jax.tree.leaves(named["index"]) if "index" in named else others
    leading = Counter(jnp.shape(leaf)[0] for leaf in others if jnp.ndim(leaf))
    # A minibatch may hold arrays of another length, of classes or of features, too.
    lengths = [length for length, count in leading.items() if count == max(leading.values())]
    if jnp.ndim(mask) == 1 and (not lengths or len(mask) in lengths):
        if len(lengths) > 1 and chosen == "mask":
            raise ValueError(
                f'batch["mask"] has {len(mask)} entries, and as many arrays have the leading '
                f"length {lengths[0]} as {lengths[1]}, so that the number of examples is not "
                'known: name a mask of examples "example_mask", and any other otherwise'
            )
        return jnp.asarray(mask)
    expected = " or ".join(f"[{length}]" for length in lengths) or "[batch]"
    if chosen == "example_mask":
        raise ValueError(
            f'batch["example_mask"] has shape {jnp.shape(mask)}, but must be {expected}: one '
            "number for each example, 0 for padding"
        )
    if splits:
        raise ValueError(
            f'batch["mask"] has shape {jnp.shape(mask)} and not {expected}, so {splits} cannot '
            'tell how much each part counts: add batch["example_mask"], ones for a loss that is a '
            "mean over examples, each example's number of tokens for a mean over tokens"
        )
    return None


def repeat_real(batch: PyTree) -> PyTree:
    """The minibatch with its padding replaced by real examples of its own.

    A derivative that is not finite at a padded example (of log 0, of the norm of a row of zeros)
    is NaN even where its factor is 0, and no mask after the fact can take it out again. So the
    solvers hand this to the losses. Padding that repeats the examples from the first on, as
    `data.partition` makes it, stays as it is.
    """
    mask = example_mask(batch)
    if mask is None:
        return batch
    check_gatherable(mask)
    real, place = mask > 0, jnp.arange(len(mask))
    again = place % jnp.maximum(jnp.sum(real), 1)
    source = jnp.where(real, place, jnp.where(real[again], again, jnp.argmax(real)))
    paths, treedef = jax.tree.flatten_with_path(batch)
    leaves = [leaf for _, leaf in paths]
    by_example = [
        i
        for i, (path, leaf) in enumerate(paths)
        if jnp.shape(leaf)[:1] == (len(mask),) and name_of(path) not in MASKS
    ]
    # Most minibatches have no padding, and a gather of them all costs more than a copy.
    repeated = jax.lax.cond(
        jnp.all(real),
        lambda leaves: leaves,
        lambda leaves: [leaf[source] for leaf in leaves],
        [jnp.asarray(leaves[i]) for i in by_example],
    )
    for i, leaf in zip(by_example, repeated, strict=True):
        leaves[i] = leaf
    return treedef.unflatten(leaves)


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over the real examples of a minibatch.

    Args:
        values: [batch], one value for each example (already weighted, where there are weights);
            of integers and bools (`prediction == label`) the mean is a float32.
        mask: [batch], 1 for real examples and 0 for padding (`batch.get("mask")`), or numbers >= 0
            to weigh by; None: all real.

    Returns:
        Scalar, Σ mask values / Σ mask; a padded example contributes nothing, even when its value
        is not finite. Its derivative must be finite, though, or a gradient is NaN: within a
        solver's losses it is, for they are handed real examples in the place of padding; elsewhere
        `repeat_real(batch)` sees to it.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([1, 1, 0])))
        2.0
    """
    if mask is None:
        return jnp.mean(values)
    if jnp.shape(mask) != values.shape:
        raise ValueError(
            f"mask has shape {jnp.shape(mask)}, values {values.shape}: give one value an example"
        )
    weights, values = counted(mask), jnp.asarray(values)
    total = jnp.sum(weights)
    mean = jnp.sum(jnp.where(weights > 0, values, 0) * weights) / jnp.where(total > 0, total, 1)
    return mean.astype(values.dtype) if is_inexact(values) else mean


def counted(mask: Any) -> jax.Array:
    """A mask as weights >= 0, in float32 at least: in bools, bytes or bfloat16 nothing adds up."""
    mask = jnp.asarray(mask)
    return jnp.maximum(mask.astype(jnp.promote_types(mask.dtype, jnp.float32)), 0)
