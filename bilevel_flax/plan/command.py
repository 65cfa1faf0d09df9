"""`bilevel-flax plan`: from a config and a topology to one report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

from bilevel_flax.train.config import ConfigError


class Options(NamedTuple):
    """What the command was given.

    Attributes:
        config: `FILE.py[:ARG]`.
        topology: such as "v5e:16x16" or "cpu:8".
        mesh: such as "data=16,fsdp=16"; None: the config's, or data over all chips.
        overrides: of the config, `key=value`.
        as_json: print one JSON object.
    """

    config: str
    topology: str
    mesh: str | None = None
    overrides: tuple[str, ...] = ()
    as_json: bool = False


def run(options: Options) -> int:
    """Prints the plan; returns the exit code.

    In a process whose JAX has started with too few CPU devices another one does the work.

    Raises:
        ConfigError: an unknown topology, a mesh that does not divide, whatever the config refuses.
    """
    import jax

    from bilevel_flax.plan import topology

    wanted = topology.parse(options.topology)
    count = topology.virtual_devices_needed(wanted)
    try:
        # A TPU or GPU that is there is not asked: the arrays of a plan are shapes.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(count, 1))
    except RuntimeError:  # JAX has started
        if len(jax.devices("cpu")) < count:
            return _elsewhere(options, count)
    found = make(options, wanted)
    print(json.dumps(found) if options.as_json else render(found))
    return 0


def _elsewhere(options: Options, count: int) -> int:
    arguments = ["--config", options.config, "--topology", options.topology]
    arguments += ["--mesh", options.mesh] if options.mesh else []
    arguments += ["--json"] if options.as_json else []
    arguments += [f"--config.{override}" for override in options.overrides]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
    command = [sys.executable, "-m", "bilevel_flax.cli", "plan", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def make(options: Options, wanted: Any) -> dict[str, Any]:
    """The plan as one object; see docs/plan.md for its keys."""
    from bilevel_flax import sharding
    from bilevel_flax.plan import advice, memory, roofline, step, topology
    from bilevel_flax.plan.collectives import by_kind
    from bilevel_flax.train import config as configs

    config = configs.load(options.config, options.overrides)
    text = options.mesh or config.get("mesh") or f"data={wanted.count}"
    asked = math.prod(sharding.mesh_shape(text).values())
    if asked != wanted.count:
        raise ConfigError(
            f"--mesh {text} is for {asked} chips, but {options.topology} has {wanted.count}: give "
            f"e.g. --mesh data={wanted.count}"
        )
    mesh = sharding.make_mesh(text, topology.devices(wanted))
    traced = step.trace(config, mesh)
    compiled = step.compiled(traced)
    parts = memory.composition(traced, compiled)
    chip = wanted.chip
    available = compiled.limit or (chip.hbm_bytes if chip else _host_memory() // wanted.count)
    fits = compiled.limit is None and compiled.hbm_bytes_needed <= available
    state_bytes = compiled.argument_bytes - parts["minibatch"]
    estimate = None
    if chip is not None and compiled.limit is None:
        estimate = roofline.estimate(
            chip, wanted.count, traced.flops, state_bytes, compiled.collectives
        )
    whole = memory.parameter_bytes(traced)
    inner = next(iter(_leaves(traced.batch.inner)))
    candidates = advice.changes(
        parts,
        config,
        dict(mesh.shape),
        inner.shape[0],
        floor=traced.floor,
        parameter_bytes=whole,
    )
    return {
        "config": options.config,
        "topology": options.topology,
        "mesh": text,
        "compiler": "cpu" if topology.virtual_devices_needed(wanted) else "tpu",
        "chips": wanted.count,
        "parameter_bytes": whole,
        "hbm_bytes_needed": compiled.hbm_bytes_needed,
        "hbm_bytes_available": available,
        "fits": fits,
        "advice": None if fits else advice.cheapest(candidates, available),
        "memory": parts,
        "flops": traced.flops,
        "flops_per_chip": traced.flops / wanted.count,
        "gradient_units": traced.flops / traced.gradient_flops,
        "collectives": by_kind(compiled.collectives),
        "collectives_known": compiled.limit is None,
        "reductions": "floor" if traced.floor else "xla",
        "roofline_seconds": None if estimate is None else estimate._asdict(),
        "compile_seconds": compiled.seconds,
    }


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def render(found: dict[str, Any]) -> str:
    """The plan as text for a terminal."""
    from bilevel_flax.plan.roofline import ASSUMPTIONS, Roofline

    chips = found["chips"]
    lines = [
        f"{found['config']} on {found['topology']}: {chips} chips, mesh {found['mesh']}",
        f"parameters of z            {_size(found['parameter_bytes'])} in all",
        "",
        f"memory of a chip           {_size(found['hbm_bytes_needed'])} needed, "
        f"{_size(found['hbm_bytes_available'])} there",
    ]
    for name, size in found["memory"].items():
        if size:
            lines.append(f"  {name:24s} {_size(size)}")
    if found["compiler"] == "cpu" and not found["topology"].startswith("cpu"):
        lines.append("  (compiled for virtual CPU devices, whose temporaries differ from a TPU's:")
        lines.append("  pip install 'bilevel-flax[plan]' for libtpu)")
    lines += [
        "",
        f"operations of a step       {found['flops']:.3g} FLOPs, {found['flops_per_chip']:.3g} a "
        f"chip; {found['gradient_units']:.2f} gradient units (one gradient of G: 1)",
        "",
        "collectives of a step, per chip "
        + ("(one reduction)" if found["reductions"] == "floor" else "(placed by XLA)"),
    ]
    for kind, total in found["collectives"].items():
        lines.append(f"  {kind:24s} {total['count']:6d} times {_size(total['bytes'])}")
    if not found["collectives_known"]:
        lines.append("  unknown: the compiler gave up for want of memory")
    elif not found["collectives"]:
        lines.append("  none")
    if found["roofline_seconds"]:
        bounds = Roofline(**found["roofline_seconds"])
        lines += [
            "",
            f"a step takes at least      {max(bounds):.3g} s (bound by {bounds.bound}), "
            f"{sum(bounds):.3g} s if nothing overlaps",
            *(f"  {name:24s} {value:.3g} s" for name, value in bounds._asdict().items()),
            f"  assumed: {ASSUMPTIONS}",
        ]
    lines += ["", f"fits: {'yes' if found['fits'] else 'no'}"]
    if found["advice"]:
        lines.append(f"cheapest change: {found['advice']}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:8.2f} {unit}"
    return f"{count:8.0f} B"
