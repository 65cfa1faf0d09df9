"""adjoint_moves: damping, bounding and scaling v's step by two numbers is doing it step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf


def opaque(transform):
    """The same steps, but without the way to hand them on as a `Move`."""
    return optax.GradientTransformationExtraArgs(transform.init, transform.update)


def known(v, d_v):
    return {
        "inner_params": v,
        "adjoint_residual": jnp.float32(1.3),
        "adjoint_product": 0.3 * jnp.sqrt(jnp.vdot(d_v["b"], d_v["b"])),
    }


def composed(limit, between):
    grafted = between(bf.adjoint.in_own_units(optax.adam(1e-2), time_constant=10))
    return bf.adjoint.self_damped(between(bf.adjoint.bounded(grafted, limit)))


def run(transform, steps=30):
    def step(carry, key):
        v, state = carry
        d_v = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape), v)
        update, state = transform.update(d_v, state, v, **known(v, d_v))
        return (optax.apply_updates(v, update), state), None

    start = {"a": jnp.ones((3, 2)), "b": jnp.full(4, -2.0)}
    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda s: jax.lax.scan(step, s, keys)[0])((start, transform.init(start)))


def test_moves_compose_to_the_same_steps():
    fused, apart = (run(composed(1e12, between)) for between in (lambda t: t, opaque))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), fused, apart)


def test_no_pass_over_the_parameters_for_damping_and_bounding():
    v = {"b": jnp.ones(2000)}
    start = composed(1e12, opaque).init(v)

    def work(between):
        update = lambda d_v: composed(1e12, between).update(d_v, start, v, **known(v, d_v))
        return jax.jit(update).lower(v).compile().cost_analysis()

    fused, apart = work(lambda t: t), work(opaque)
    assert fused["bytes accessed"] < 0.75 * apart["bytes accessed"]


def test_the_length_of_a_direction_is_taken_anew_where_another_optimiser_changed_it():
    clipped = optax.chain(optax.clip(0.1), composed(1e12, lambda t: t))
    v, d_v = {"b": jnp.ones(4)}, {"b": jnp.full(4, 3.0)}
    length = {"direction_length": jnp.linalg.norm(d_v["b"]), "grad": d_v}

    def step(transform, **extra_args):
        update, state = transform.update(d_v, transform.init(v), v, **known(v, d_v), **extra_args)
        return jax.tree.leaves((update, state))

    for transform in (clipped, composed(1e12, lambda t: t)):
        for one, other in zip(step(transform), step(transform, **length), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    update = jax.jit(
        lambda d_v, length: composed(1e12, lambda t: t).update(
            d_v,
            composed(1e12, lambda t: t).init(v),
            v,
            direction_length=length,
            grad=d_v,
            **known(v, v),
        )[1]
    )
    assert not np.allclose(*(np.hstack(jax.tree.leaves(update(d_v, size))) for size in (1.0, 9.0)))


def test_a_float16_step_is_scaled_in_float32():
    transform = bf.adjoint.bounded(optax.sgd(1.0), 1e3)
    v = jnp.full(4, 2e4, jnp.float16)
    update, _ = transform.update(
        jnp.zeros(4, jnp.float16), (optax.EmptyState(),) * 2, v, inner_params=0 * v
    )
    assert update.dtype == jnp.float16
    np.testing.assert_allclose(jnp.linalg.norm((v + update).astype(jnp.float32)), 1e3, rtol=2e-2)
