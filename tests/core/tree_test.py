"""tree: norms and inner products, small leaves put together."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.tree import dot, norm

RNG = np.random.default_rng(0)


def leaves(dtype, *shapes):
    return [jnp.asarray(RNG.normal(size=shape), dtype) for shape in shapes]


def products(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("dot_general")


def test_small_leaves_are_summed_in_one_product_and_large_ones_each_in_their_own():
    a, b = (
        {"z": leaves(jnp.float32, (3,), (4, 5), (), (40, 40), (2, 3, 1)), "n": jnp.arange(3)}
        for _ in range(2)
    )
    flat = [np.concatenate([np.ravel(leaf) for leaf in tree["z"]]) for tree in (a, b)]
    np.testing.assert_allclose(norm(a), np.linalg.norm(flat[0]), rtol=1e-6)
    np.testing.assert_allclose(dot(a["z"], b["z"]), flat[0] @ flat[1], rtol=1e-5)
    assert products(norm, a) == products(dot, a["z"], b["z"]) == 2


def test_dtypes_are_not_mixed_and_a_leaf_that_is_not_finite_shows():
    tree = leaves(jnp.float32, (7,), (3,)) + leaves(jnp.bfloat16, (5,))
    with jax.enable_x64(True):
        wide = jnp.asarray(RNG.normal(size=6), jnp.float64)
        assert norm([wide, *tree]).dtype == jnp.float64
        assert norm([1e-300 * wide]) == 0  # squares of float64 still underflow
        np.testing.assert_allclose(
            norm([wide, wide]), np.sqrt(2) * np.linalg.norm(wide), rtol=1e-14
        )
    assert not jnp.isfinite(norm([*tree, jnp.array([1.0, jnp.nan])]))
    assert norm([]) == 0 == dot([], [])
