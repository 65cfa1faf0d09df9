"""`bilevel-flax plan`: from a config and a topology to one report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.heartbeat import Heartbeat

_PROGRESS_SECONDS = 10.0


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
    plan = make(options, wanted)
    print(json.dumps(plan) if options.as_json else render(plan))
    return 0


def _elsewhere(options: Options, count: int) -> int:
    arguments = ["--config", options.config, "--topology", options.topology]
    arguments += ["--mesh", options.mesh] if options.mesh else []
    arguments += ["--json"] if options.as_json else []
    arguments += [f"--config.{override}" for override in options.overrides]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
    command = [sys.executable, "-m", "bilevel_flax.cli", "plan", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:  # progress, as it comes; the plan itself is short
            sys.stderr.write(line)
            sys.stderr.flush()
        sys.stdout.write(process.stdout.read())
    return process.returncode


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make(options: Options, wanted: Any) -> dict[str, Any]:
    """The plan as one object; see docs/plan.md for its keys."""
    from bilevel_flax import sharding
    from bilevel_flax.plan import advice, memory, step, topology
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
    with Heartbeat(_log, f"tracing the step of {options.config}", _PROGRESS_SECONDS):
        lowered = step.lower(config, mesh)
    doing = f"compiling the step for {options.topology} (a decoder takes minutes)"
    with Heartbeat(_log, doing, _PROGRESS_SECONDS):
        compiled = step.compiled(lowered)
    parts = memory.composition(lowered, compiled)
    chip = wanted.chip
    available = compiled.limit or (chip.hbm_bytes if chip else _host_memory() // wanted.count)
    on_cpu = topology.virtual_devices_needed(wanted) > 0
    needed, fits = verdict(compiled, available, another_compiler=on_cpu and chip is not None)
    whole = memory.parameter_bytes(lowered)
    suggestion = None
    if fits is False and needed is not None:
        facts = {"reduces_once": lowered.reduces_once, "parameter_bytes": whole}
        batch_size = next(iter(_leaves(lowered.batch.inner))).shape[0]
        suggestion = advice.cheapest(
            advice.split_activations(parts, **facts),
            advice.changes(parts, config, dict(mesh.shape), batch_size, **facts),
            available,
        )
    return {
        "config": options.config,
        "topology": options.topology,
        "mesh": text,
        "compiler": "cpu" if on_cpu else "tpu",
        "chips": wanted.count,
        "parameter_bytes": whole,
        "hbm_bytes_needed": needed,
        "hbm_bytes_at_least": compiled.argument_bytes,
        "hbm_bytes_available": available,
        "fits": fits,
        "advice": suggestion,
        "memory": parts,
        "flops": lowered.flops,
        "flops_per_chip": lowered.flops / wanted.count,
        "gradient_units": lowered.flops / lowered.gradient_flops,
        "collectives": by_kind(compiled.collectives),
        "collectives_known": compiled.limit is None,
        "reductions": "shard_map" if lowered.reduces_once else "gspmd",
        "compile_seconds": compiled.seconds,
    }


def verdict(
    compiled: Any, available: int, *, another_compiler: bool
) -> tuple[int | None, bool | None]:
    """(bytes that a chip needs, whether it has them); None: not known.

    Args:
        compiled: from `step.compiled`.
        available: bytes of a chip.
        another_compiler: it is not the chip's own. A CPU's keeps several times the temporaries of
            a TPU's, so only what the step is handed is sure to be there.
    """
    if another_compiler:
        return None, False if compiled.argument_bytes > available else None
    return compiled.hbm_bytes_needed, compiled.limit is None and (
        compiled.hbm_bytes_needed <= available
    )


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def render(plan: dict[str, Any]) -> str:
    """The plan as text for a terminal."""
    chips = plan["chips"]
    known = plan["hbm_bytes_needed"] is not None
    needed = plan["hbm_bytes_needed"] if known else plan["hbm_bytes_at_least"]
    lines = [
        f"{plan['config']} on {plan['topology']}: {chips} chips, mesh {plan['mesh']}",
        f"parameters of z            {_size(plan['parameter_bytes'])} in all",
        "",
        f"memory of a chip           {_size(needed)} needed{'' if known else ' at the least'}, "
        f"{_size(plan['hbm_bytes_available'])} there",
    ]
    for name, size in plan["memory"].items():
        if size and not (name in ("activations", "other") and not known):
            lines.append(f"  {name:24s} {_size(size)}")
    if not known:
        lines.append("  activations              not known without libtpu")
    lines += [
        "",
        f"operations of a step       {plan['flops']:.3g} FLOPs, {plan['flops_per_chip']:.3g} a "
        f"chip; {plan['gradient_units']:.2f} gradient units (one gradient of G: 1)",
        "",
        "collectives of a step, per chip "
        + ("(one reduction)" if plan["reductions"] == "shard_map" else "(placed by XLA)"),
    ]
    for kind, total in plan["collectives"].items():
        lines.append(f"  {kind:24s} {total['count']:6d} times {_size(total['bytes'])}")
    if not plan["collectives_known"]:
        lines.append("  unknown: the compiler gave up for want of memory")
    elif not plan["collectives"]:
        lines.append("  none")
    lines += ["", f"fits: {_VERDICTS[plan['fits']]}"]
    if plan["advice"]:
        lines.append(f"cheapest change: {plan['advice']}")
    return "\n".join(lines)


_VERDICTS = {
    True: "yes",
    False: "no",
    None: "not known: TPUs' compiler is not here, and a CPU's says nothing about activations; "
    "pip install 'bilevel-flax[plan]' (libtpu, Linux) and plan again",
}


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:8.2f} {unit}"
    return f"{count:8.0f} B"
