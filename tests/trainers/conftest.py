"""Each adapter against the real package, in an environment of its own: `make test-trainers`."""

import os

# Levanter spreads its program over all eight devices, and each waits in two reductions at once:
# more threads than XLA's pool has on a machine of few cores, where the program would hang.
os.environ.setdefault("NPROC", "32")

import jax
import pytest


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Other people's models broadcast as they like."""
    before = jax.config.jax_numpy_rank_promotion  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)
