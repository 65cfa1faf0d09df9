"""What can be planned for: TPU slices, by libtpu or on virtual CPU devices, and CPUs.

References:
    Google Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" (2026).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from bilevel_flax.train.config import ConfigError, nearest

GIB = 2**30


class Chip(NamedTuple):
    """One chip of a generation.

    Attributes:
        hbm_bytes: memory that a program may use.
        axes: of the torus.
    """

    hbm_bytes: int
    axes: int


# Memory as libtpu 0.0.52 says it is there: the runtime keeps a little of it back.
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 3),
    "v5e": Chip(int(15.75 * GIB), 2),
    "v5p": Chip(int(95.73 * GIB), 3),
    "v6e": Chip(int(31.24 * GIB), 2),
}
_SMALL_SLICES = {"v4": "v4-8", "v5e": "v5litepod-16", "v5p": "v5p-8", "v6e": "v6e-8"}
_EXAMPLES = "such as v5e:16x16, v5p:8x8x8 or cpu:8"


class Topology(NamedTuple):
    """A number of chips and what is known about them.

    Attributes:
        name: as it was given.
        count: chips.
        chip: None for CPUs.
    """

    name: str
    count: int
    chip: Chip | None


def parse(text: str) -> Topology:
    """Reads "v5e:16x16" or "cpu:8".

    Raises:
        ConfigError: an unknown generation, or a shape that is none.
    """
    name, _, shape = text.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(f"--topology={text}: give a generation and a shape, {_EXAMPLES}")
    sizes = [int(size) for size in shape.split("x")]
    if name == "cpu":
        if len(sizes) > 1:
            raise ConfigError(
                f"--topology={text}: CPUs have no shape, write cpu:{math.prod(sizes)}"
            )
        return Topology(text, sizes[0], None)
    if name not in CHIPS:
        known = [*CHIPS, "cpu"]
        raise ConfigError(
            f"--topology={text}: unknown, choose among {', '.join(known)}, {_EXAMPLES}"
            f"{nearest(name, known)}"
        )
    chip = CHIPS[name]
    if len(sizes) != chip.axes:
        example = "x".join(["4"] * chip.axes)
        raise ConfigError(
            f"--topology={text}: {name} chips form a torus of {chip.axes} axes, write e.g. "
            f"{name}:{example}"
        )
    return Topology(text, math.prod(sizes), chip)


def has_libtpu() -> bool:
    """Whether programs for TPUs can be compiled here."""
    return importlib.util.find_spec("libtpu") is not None


def virtual_devices_needed(topology: Topology) -> int:
    """CPU devices that must be there before JAX starts; 0 where libtpu compiles."""
    return 0 if topology.chip is not None and has_libtpu() else topology.count


def devices(topology: Topology) -> Sequence[Any]:
    """Something to make a mesh of: a TPU slice that is not there, or virtual CPU devices.

    Raises:
        ConfigError: libtpu knows no such slice, or the CPU devices are too few.
    """
    if not virtual_devices_needed(topology):
        return _slice(topology)
    here = jax.devices("cpu")
    if len(here) < topology.count:
        raise ConfigError(
            f"--topology={topology.name} needs {topology.count} virtual CPU devices, but JAX has "
            f"started with {len(here)}: set JAX_NUM_CPU_DEVICES={topology.count}"
        )
    return here[: topology.count]


def _slice(topology: Topology) -> Sequence[Any]:
    # libtpu would ask the metadata server of a TPU host, wait for it, and complain; and let one
    # process in at a time, for a chip that is not there.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", _SMALL_SLICES[topology.name.partition(":")[0]]),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        # A v4 chip's two cores are one device, as on Cloud TPUs; later chips know no other way.
        cores = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **cores)
    except Exception as error:  # libtpu's own, of several types
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--topology={topology.name}: libtpu refuses it: {first}") from error
    return slice_.devices
