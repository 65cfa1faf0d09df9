"""Settings and fixtures for every test: tests/, the examples' own tests and the doctests.

It lies at the root, not in tests/, because pytest hands fixtures downwards only.
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported: a machine with an accelerator must give the same numbers.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests cost, and nothing tested hangs on the compiler's effort. With
# "0" they see the programs that users run; .ci/run does that in one of its environments.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A program compiled in one part takes half the CPU time of one in as many parts as there are cores.
# The emitters through MLIR take twice as long to compile; later jaxlibs have no others.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    + (
        " --xla_cpu_use_fusion_emitters=false"
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
        and version("jaxlib")[:4] in "0.10 0.11"
        else ""
    ),
)
# Two workers, and the programs that tests start, compile much that is the same.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import importlib.util

import jax
import pytest

# Adapters are imported with what they adapt to (`make test-trainers`), so for doctests, too.
collect_ignore_glob = [
    f"bilevel_flax/trainers/{name}*.py"
    for name in ("datasets", "kauldron", "levanter", "tunix")
    if getattr(importlib.util.find_spec(name), "origin", None) is None
]
# Programs that tests run: looking for doctests would run them, too.
collect_ignore = ["tests/trainers/scripts"]
collect_ignore_glob += ["examples/plug_in/*_before.py", "examples/plug_in/*_after.py"]

# A [n] against a [n, 1] that broadcasts to [n, n] is the usual silent mistake in losses.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Meshes need devices; whatever asks for none of them runs on the first, as ever.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test; the default stays float32, as users run it."""
    before = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data files; the test skips without one, and fails where CI requires it."""
    name = os.environ.get("BILEVEL_FLAX_DATA", "")
    if name and Path(name).is_dir():
        return Path(name)
    if name:
        reason = f"BILEVEL_FLAX_DATA={name!r} is not a folder"
    else:
        reason = "needs real data files: set BILEVEL_FLAX_DATA to the folder that holds them"
    if os.environ.get("BILEVEL_FLAX_REQUIRE_DATA"):
        pytest.fail(f"{reason} (BILEVEL_FLAX_REQUIRE_DATA is set, so this is not skipped)")
    pytest.skip(reason)
