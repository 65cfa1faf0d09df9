"""What XLA makes of the steps for a GPU that is not there: temporaries, and seconds of compilation.

    pip install "jax[cuda13]"
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/gpu_compile.py --only "gpt remat" darts

The programs of `benchmarks/gpu.py`, compiled for an H100 by its description. Kernels are not tuned,
for which a device is needed: compilation is shorter than there, temporaries are those of the device
or up to 40 % less, and nothing is run. Entries with cuDNN's attention need the device: JAX asks it
whether it can.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import bilevel_flax as bf
from benchmarks import gpu
from benchmarks.rows import Rows, add_argument
from benchmarks.tasks import networks

# XLA's GpuTargetConfigProto; figures of NVIDIA's H100 (SXM, 80 GB).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ENTRIES = ("gpt", "gpt remat", "resnet", "cnn", "lm_pod small", "darts")


def steps_of(entry: str, size: dict[str, Any]) -> tuple[Iterable[tuple], dict[str, Any]]:
    """`(name, step, start)` of each variant, and a minibatch."""
    if entry == "darts":
        made = gpu.search(size)
        return gpu.search_steps(made), made.batch
    if entry in ("gpt", "gpt remat"):
        network = networks.decoder(*size["gpt"], dtype=jnp.bfloat16, remat=entry == "gpt remat")
    elif entry == "lm_pod small":
        network = networks.decoder(*size[entry], dtype=jnp.bfloat16, remat=False)
    elif entry == "resnet":
        network = networks.resnet(*size[entry], dtype=jnp.bfloat16)
    else:
        network = networks.small_cnn(size[entry])
    return gpu.variants(network), network.batch


def compiled(step: Any, arguments: tuple, device: Any) -> dict[str, float]:
    """Of one step.

    Args:
        step: `step(carry, batch)`.
        arguments: shapes of both.
        device: of a topology.
    """
    here = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), arguments
    )
    lowered = jax.jit(step, donate_argnums=0).trace(*shapes).lower(lowering_platforms=("cuda",))
    began, cpu = time.perf_counter(), time.process_time()
    program = lowered.compile()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    temporaries = getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
    return {"compile_seconds": wall, "compile_cpu": cpu, "GB": temporaries / 1e9}


def main() -> None:
    """Prints a row for each program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=ENTRIES)
    parser.add_argument("--variants", nargs="+", default=(), help="their names; else all")
    parser.add_argument("--size", choices=gpu.SIZES, default="full")
    add_argument(parser)
    args = parser.parse_args()
    jax.devices("cpu")  # what is computed here is computed on it
    jax.config.update("jax_platforms", "cpu")
    described = {"target_config": H100, "topology": "1x1x1"}
    device = topologies.get_topology_desc("h100", "cuda", **described).devices[0]
    with Rows(args.markdown) as rows, mock.patch.object(jax, "default_backend", lambda: "gpu"):
        for entry in args.only:
            steps, batch = steps_of(entry, gpu.SIZES[args.size])
            plain: dict[str, float] = {}
            for name, step, start in steps:
                if args.variants and name not in args.variants:
                    continue
                found = compiled(step, (jax.eval_shape(start), batch), device)
                plain = plain or found
                found["plain_temporaries"] = found["GB"] / plain["GB"]
                shown = {key: f"{value:.4g}" for key, value in found.items()}
                rows.add({"variant": name, **shown}, f"{entry}, {bf.__version__}")


if __name__ == "__main__":
    main()
