"""A mesh of devices from one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
# Examples are spread over both: a device of an fsdp group computes on a share of its own.
BATCH_AXES = ("data", "fsdp")


def mesh_shape(text: str) -> dict[str, int]:
    """The sizes that a line like "data=2,fsdp=4" names, in the order of `AXES`, others 1.

    Raises:
        ValueError: it cannot be read; names the part that is wrong.

    Example:
        >>> mesh_shape("fsdp=4,data=2")
        {'data': 2, 'fsdp': 4, 'tensor': 1}
    """
    if not isinstance(text, str):
        raise ValueError(f'mesh={text!r} must be a text like "data=2,fsdp=4"')
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise ValueError(
                f'mesh="{text}" names the axis "{name}": choose from {", ".join(AXES)}, '
                'e.g. "data=2,fsdp=4"'
            )
        if name in found:
            raise ValueError(f'mesh="{text}" gives "{name}" twice: name each axis once')
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f'mesh="{text}" gives {name} the size "{size}": write an integer of 1 or more, '
                f'e.g. "{name}=4"'
            )
        found[name] = int(size)
    return {name: found.get(name, 1) for name in AXES}


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`.

    Args:
        text: their sizes, e.g. "data=2,fsdp=4"; axes that are left out have size 1.
        devices: which; their number must be the product of the sizes. None: all of
            `jax.devices()`, those of every process.

    Returns:
        A mesh of axis type Auto: with JAX's default, Explicit, `w[batch["index"]]` raises.

    Raises:
        ValueError: an unknown axis, a size that is none, or another number of devices.

    Example:
        >>> import jax
        >>> mesh = make_mesh("data=1", jax.devices()[:1])
        >>> dict(mesh.shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    shape = mesh_shape(text)
    given = jax.devices() if devices is None else list(devices)
    wanted = math.prod(shape.values())
    if wanted != len(given):
        product = "*".join(str(size) for size in shape.values())
        raise ValueError(
            f'mesh="{text}" asks for {product} = {wanted} devices, but there are {len(given)}: '
            f'change a size (e.g. "data={len(given)}")'
            + (" or hand over devices=jax.devices()[:n]" if wanted < len(given) else "")
        )
    sizes = tuple(shape.values())
    auto = (AxisType.Auto,) * len(AXES)
    if devices is None:  # JAX knows which neighbours are near in the network
        return jax.make_mesh(sizes, AXES, axis_types=auto)
    return Mesh(np.array(given).reshape(sizes), AXES, axis_types=auto)


def batch_share(mesh: Mesh) -> int:
    """The number of shares that a minibatch is cut into: devices along data and fsdp.

    Example:
        >>> import jax, bilevel_flax as bf
        >>> mesh = bf.sharding.make_mesh("data=1", devices=jax.devices()[:1])
        >>> bf.sharding.batch_share(mesh)
        1
    """
    return math.prod(mesh.shape[name] for name in BATCH_AXES)
