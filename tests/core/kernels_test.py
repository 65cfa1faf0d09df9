"""Kernels that JAX cannot differentiate twice: which ways work on them, and a reference's tangents.

The fake kernel calls back to NumPy, so that nothing but its own `custom_vjp` can differentiate it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax.oracles.jaxprs import equations

RNG = np.random.default_rng(0)
POINT = bf.Variables(
    {"w": RNG.normal(size=(3, 3)) / 2}, {"w": RNG.normal(size=(3, 3))}, RNG.normal(size=2)
)
BATCH = RNG.normal(size=(4, 3))


def plain(a, w, times):
    return jnp.tanh(a @ w) * times, jnp.sin(a)


def fake_kernel(off: float = 0.0):
    """`plain` without a second derivative; `off` is added to its first gradient in w."""

    def on_host(a, w, times):
        return tuple(np.asarray(out, a.dtype) for out in (np.tanh(a @ w) * times, np.sin(a)))

    def called(a, w, times):
        shapes = jax.eval_shape(plain, a, w, times)
        return jax.pure_callback(on_host, shapes, a, w, times, vmap_method="sequential")

    kernel = jax.custom_vjp(called)

    def backward(kept, cotangents):
        a, w, times, out = kept
        inner = (times - out**2 / times) * cotangents[0]
        host_cos = lambda a: np.cos(np.asarray(a))
        cos = jax.pure_callback(host_cos, a, a, vmap_method="sequential")
        return inner @ w.T + cos * cotangents[1], a.T @ inner + off, None

    def forward(a, w, times):
        out = kernel(a, w, times)
        return out, (a, w, times, out[0])

    kernel.defvjp(forward, backward)
    return kernel


def loss_of(function, around=lambda f: f, steps=2):
    """A loss that calls `function` in a scan, with an integer argument."""

    def loss(z, x, batch):
        def body(a, _):
            out, sine = around(function)(a, z["w"], jnp.int32(2))
            return 0.3 * out + 0.1 * sine * x[0], jnp.sum(sine**2)

        a, sums = jax.lax.scan(body, batch, None, length=steps)
        return jnp.sum(a**3) * jnp.exp(x[1]) + sums.sum()

    return loss


def problem_of(loss, **kwargs):
    return bf.Problem(loss, loss, **kwargs)


AROUND = {
    "scan": lambda f: f,
    "jit": jax.jit,
    "checkpoint": lambda f: jax.checkpoint(jax.jit(f)),
    "vmap": lambda f: lambda a, *rest: jax.vmap(lambda row: f(row, *rest))(a),
}


@pytest.mark.parametrize(
    ("around", "derivatives"),
    [
        ("scan", "forward_over_reverse"),
        ("jit", "reverse_over_reverse"),
        ("checkpoint", "forward_over_reverse"),
        ("vmap", "reverse_over_reverse"),
    ],
)
def test_the_oracles_on_a_kernel_are_those_of_dense_jacobians(x64, around, derivatives):
    whole, fast = plain, oracles.with_reference(fake_kernel(), plain)
    if around == "vmap":  # of one row
        by_row = lambda f: lambda a, w, t: jax.tree.map(lambda o: o[0], f(a[None], w, t))
        whole, fast = by_row(whole), by_row(fast)
    loss, dense = loss_of(fast, AROUND[around]), loss_of(whole, AROUND[around])
    run = jax.jit(functools.partial(oracles.evaluate, problem_of(loss, derivatives=derivatives)))
    found = run(POINT, bf.Batch(BATCH, BATCH))
    flat, to_z = ravel_pytree(POINT.inner)
    v = ravel_pytree(POINT.adjoint)[0]
    gradient = lambda z, x: jax.grad(lambda z: dense(to_z(z), x, BATCH))(z)
    first, (hessian, cross) = jax.jit(
        lambda z, x: (gradient(z, x), jax.jacfwd(gradient, (0, 1))(z, x))
    )(flat, POINT.outer)
    for ours, theirs in (
        (found.inner_grad, first),
        (found.hvp, hessian @ v),
        (found.cross_jvp, cross.T @ v),
    ):
        np.testing.assert_allclose(ravel_pytree(ours)[0], theirs, rtol=1e-8, atol=1e-8)


def test_the_first_gradient_is_the_kernels_and_the_second_the_references(x64):
    # A kernel whose backward pass is off by a constant: the gradient shows it, its derivative not.
    fast = oracles.with_reference(fake_kernel(off=0.25), plain)
    ours, theirs = (
        lambda w, f=f: jnp.sum(f(BATCH, w, jnp.int32(2))[0] ** 2) for f in (fast, plain)
    )
    w, along = POINT.inner["w"], POINT.adjoint["w"]

    @jax.jit
    def products(w):
        both = [jax.jvp(jax.grad(f), (w,), (along,)) for f in (ours, theirs)]
        return *both, jax.jvp(ours, (w,), (along,))[1], jax.jvp(theirs, (w,), (along,))[1]

    mine, reference, slope, expected = products(w)
    np.testing.assert_allclose(mine[0], reference[0] + 0.25, rtol=1e-10)
    np.testing.assert_allclose(mine[1], reference[1], rtol=1e-10)
    np.testing.assert_allclose(slope, expected, rtol=1e-12)


def test_a_bf16_kernel_in_a_float32_loss():
    reference = lambda a, w: jnp.tanh(a @ w)

    @jax.custom_vjp
    def kernel(a, w):
        return jax.pure_callback(lambda a, w: np.tanh(a @ w), jax.eval_shape(reference, a, w), a, w)

    def backward(kept, cotangent):
        a, w, out = kept
        inner = (1 - out**2) * cotangent
        return inner @ w.T, a.T @ inner

    def forward(a, w):
        out = kernel(a, w)
        return out, (a, w, out)

    kernel.defvjp(forward, backward)
    half = lambda f: (
        lambda z, x, b: jnp.mean(
            f(b.astype(jnp.bfloat16), (z * x).astype(jnp.bfloat16)).astype(jnp.float32) ** 2
        )
    )
    fast = oracles.with_reference(kernel, reference)
    point = bf.Variables(*(jnp.asarray(a, jnp.float32) for a in (np.eye(3), np.ones((3, 3)), 1.0)))
    batch = jnp.asarray(BATCH, jnp.float32)
    with pytest.raises(ValueError, match=r"finite_differences.*computations in bfloat16"):
        state = bf.soba(
            problem_of(half(fast), derivatives="finite_differences"),
            inner=optax.sgd(0.1),
            outer=optax.sgd(0.1),
        )
        state.update(state.init(point.inner, point.outer), bf.Batch(batch, batch))
    evaluate = lambda f: jax.jit(functools.partial(oracles.evaluate, problem_of(half(f))))(
        point, bf.Batch(batch, batch)
    )
    mine, theirs = evaluate(fast), evaluate(reference)
    assert mine.hvp.dtype == jnp.float32
    for ours, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert jnp.linalg.norm(ours - other) <= 0.02 * jnp.linalg.norm(other)


def test_probe_names_what_stops_each_mode():
    point = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), POINT)
    batch = jnp.asarray(BATCH, jnp.float32)
    bare = loss_of(fake_kernel(), jax.jit)
    found = oracles.probe(problem_of(bare), point, batch)
    assert found.mode == "finite_differences"
    for mode in ("forward_over_reverse", "reverse_over_reverse"):
        assert "pure_callback" in found.stopped_by[mode]
    assert found.stopped_by["first_order"] == ""
    assert "\n" not in found.message
    assert oracles.probe(problem_of(loss_of(plain)), point, batch).mode == "forward_over_reverse"
    lent = oracles.with_reference(fake_kernel(), plain)
    assert not any(oracles.probe(problem_of(loss_of(lent)), point, batch).stopped_by.values())

    solver = bf.soba(problem_of(bare), inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(point.inner, point.outer)
    step = jax.jit(solver.update)
    with pytest.raises(TypeError, match=r"pure_callback.*with_reference.*probe") as error:
        step(state, bf.Batch(batch, batch))
    assert "\n" not in str(error.value)
    never = lambda z, x, b: jnp.sum(
        jax.pure_callback(lambda a: np.asarray(a), z["w"], z["w"]) * x[0]
    )
    with pytest.raises(TypeError, match=r"point is a dict, but must be a TrainState"):
        oracles.probe(problem_of(bare), point.inner, batch)
    with pytest.raises(TypeError, match=r"not be differentiated even once: .*pure_callback"):
        oracles.probe(problem_of(never), point, batch)
    bent = jax.custom_jvp(lambda a: a**2)
    bent.defjvp(lambda a, t: (bent(a[0]), jnp.abs(a[0] * t[0])))  # not linear in the tangent
    with pytest.raises(TypeError, match=r"even once: jax.custom_jvp '<lambda>' stops it"):
        oracles.probe(problem_of(lambda z, x, b: bent(z["w"]).sum() * x[0]), point, batch)


def test_probe_takes_numpy_arrays_that_the_loss_indexes_by_what_is_traced():
    """As a run hands over its first minibatch; `select` does this to a minibatch of candidates."""

    def loss(z, x, batch):
        return ((z - x[jnp.argmax(z)] * batch["y"][jnp.argsort(z)]) ** 2).mean()

    point = bf.Variables(np.ones(3, np.float32), np.zeros(3), np.ones(3, np.float32))
    probe = oracles.probe(bf.Problem(loss, loss), point, {"y": np.arange(3.0)})
    assert probe.mode == "forward_over_reverse"
    assert bf.diagnostics.check_symmetry(bf.Problem(loss, loss), point, {"y": np.arange(3.0)}).ok


def test_probe_sends_a_nested_custom_vjp_to_reverse_mode():
    @jax.custom_vjp
    def square(a):
        return a**2

    square.defvjp(lambda a: (a**2, a), lambda a, g: (2 * a * g,))

    @jax.custom_vjp
    def cube(a):
        return a * square(a)

    cube.defvjp(lambda a: (a * square(a), a), lambda a, g: (3 * square(a) * g,))

    def loss(z, x, batch):
        return jax.lax.scan(lambda a, _: (cube(a), None), z, None, length=2)[0].sum() * x

    point = bf.Variables(jnp.ones(2), jnp.ones(2), jnp.float32(1.0))
    found = oracles.probe(problem_of(loss), point, None)
    assert found.mode == "reverse_over_reverse"
    assert found.stopped_by["forward_over_reverse"] == "jax.custom_vjp 'square'"


def test_a_reference_that_computes_something_else_is_refused():
    a, w = (jnp.asarray(array, jnp.float32) for array in (BATCH, POINT.inner["w"]))
    wrong = lambda a, w, times: (plain(a, w, times)[0] * 1.01, jnp.sin(a))
    with pytest.raises(ValueError, match=r"differ: output 0 by 0\.00"):
        oracles.with_reference(fake_kernel(), wrong)(a, w, jnp.int32(2))
    with pytest.raises(ValueError, match=r"the gradient in argument \[1\] by"):
        oracles.with_reference(fake_kernel(off=0.5), plain)(a, w, jnp.int32(2))
    with pytest.raises(ValueError, match=r"returns shapes .* its reference"):
        oracles.with_reference(fake_kernel(), lambda a, w, t: plain(a[:1], w, t))(
            a, w, jnp.int32(2)
        )
    for_small = oracles.with_reference(jnp.multiply, lambda a, by: a * min(by, 2.0))
    for_small(a, 1.0)
    with pytest.raises(ValueError, match="and its reference differ"):  # a setting is a new kernel
        for_small(a, 3.0)
    loss = loss_of(oracles.with_reference(fake_kernel(), wrong), jax.jit)
    point = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), POINT)
    with pytest.raises(ValueError, match="a kernel and its reference differ"):
        oracles.probe(problem_of(loss), point, a)
    closing = lambda w: oracles.with_reference(lambda a: a @ w, lambda a: a @ w)(a).sum()
    with pytest.raises(ValueError, match="uses a traced array .* that is no argument"):
        jax.grad(closing)(w)


def test_integers_among_a_kernels_outputs(x64):
    def whole(a):
        return {"cube": jnp.sum(a**3), "order": jnp.argsort(a), "mask": a > 0.1}

    fast = oracles.with_reference(jax.custom_vjp(whole), whole)
    fast.fast.defvjp(
        lambda a: (whole(a), a),
        lambda a, c: (
            jax.pure_callback(lambda a: 3 * a**2, a, a, vmap_method="sequential") * c["cube"],
        ),
    )
    a = RNG.normal(size=3) / 2
    assert fast(a)["order"].tolist() == np.argsort(a).tolist()

    def loss(function, a):
        def body(a, row):
            out = jax.checkpoint(function)(a * row)
            return jnp.where(out["mask"], a * out["cube"], a[out["order"]]), None

        rows = jax.vmap(function, 1)(jnp.outer(a, jnp.sin(a)))
        return jnp.sum(jax.lax.scan(body, a, jnp.ones((2, 3)))[0] ** 2) + jnp.sum(rows["cube"] ** 2)

    for second in (jax.jacfwd, jax.jacrev):
        mine, theirs = (
            jax.jit(second(jax.grad(functools.partial(loss, f))))(a) for f in (fast, whole)
        )
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_comparison_sees_small_outputs_and_takes_what_is_no_finite_float():
    a = jnp.array([1.0, -2.0, 0.5])
    with pytest.raises(ValueError, match="differ: output 1 by"):
        oracles.with_reference(lambda a: (1e4 * a, a), lambda a: (1e4 * a, 1.1 * a))(a)
    with pytest.raises(ValueError, match="differ: output 0 is not finite in one of them"):
        oracles.with_reference(lambda a: jnp.log(jnp.maximum(a, 0)), jnp.log)(a)
    same = (
        lambda a: jnp.where(a > 0, a, -jnp.inf),  # the log-sum-exp of a row that sees nothing
        lambda a: jnp.argsort(a),
        lambda a: jnp.fft.fft(a),
        lambda a: a.astype(jnp.int32) * 2,
    )
    for function in same:
        np.testing.assert_array_equal(oracles.with_reference(function, function)(a), function(a))
    assert oracles.with_reference(lambda i: i + 1, lambda i: i + 1)(jnp.int32(1)) == 2
    with pytest.raises(ValueError, match="differ: output 0 by"):
        oracles.with_reference(jnp.fft.fft, lambda a: jnp.conj(jnp.fft.fft(a)))(a)


def test_numbers_that_tell_nothing_do_not_count_as_a_comparison():
    right = jax.nn.dot_product_attention
    kernel = oracles.with_reference(right, functools.partial(oracles.chunked_attention, scale=1.0))
    for rows in (jnp.zeros((1, 4, 2, 3)), jnp.ones((1, 4, 2, 3))):  # as networks are initialised
        kernel(rows, rows, rows)
    q = jax.random.normal(jax.random.key(0), (1, 4, 2, 3))
    with pytest.raises(ValueError, match="and its reference differ"):
        kernel(q, q, q)
    lost = jax.lax.stop_gradient
    quiet = oracles.with_reference(lost, lost)
    for _ in range(12):  # its gradient never tells anything, and is not compared for ever
        quiet(q)
    assert quiet._doubts and all(left == 0 for _, left in quiet._doubts.values())


def test_settings_are_told_apart_by_their_types():
    def scaled(a, by):
        return a * (10 if by is True else np.copysign(2.5, by) if isinstance(by, float) else by)

    kernel, a = oracles.with_reference(scaled, scaled), jnp.ones(())
    settings = (1, True, 0.0, -0.0)
    assert [float(kernel(a, by)) for by in settings] == [float(scaled(a, by)) for by in settings]
    cast = lambda a, dtype: a.astype(dtype)
    assert oracles.with_reference(cast, cast)(a, np.float16).dtype == np.float16
    times = oracles.with_reference(jnp.matmul, jnp.matmul)
    for precision in ("float32", "bfloat16"):  # of the context, as `jax.jit` knows
        with jax.default_matmul_precision(precision):
            traced = jax.make_jaxpr(lambda a: jax.grad(lambda a: times(a, a).sum())(a))(jnp.eye(2))
            kernels = [e.params["function"] for e in equations(traced) if "function" in e.params]
            inside = str([jax.make_jaxpr(k.run)(*[jnp.eye(2)] * 2) for k in kernels[:1]])
            assert ("HIGHEST" in inside) == (precision == "float32")
    with pytest.raises(TypeError, match=r"the argument \[1\] of scaled is a set.*hashed: pass"):
        kernel(a, {1})


def test_a_kernel_without_a_gradient_and_a_reference_that_is_a_kernel_are_refused():
    never = lambda a: jax.pure_callback(np.sin, a, a)
    with pytest.raises(
        TypeError, match="<lambda> cannot be differentiated even once.*callback: giv"
    ):
        oracles.with_reference(never, jnp.sin)(jnp.ones(2))
    sine = jax.custom_vjp(jnp.sin)
    sine.defvjp(lambda a: (sine(a), a), lambda a, c: (jnp.cos(a) * c,))
    swapped = oracles.with_reference(jnp.sin, sine)
    with pytest.raises(
        TypeError, match="reference of sin cannot be .* twice.*custom_vjp 'sin'.*first"
    ):
        jax.jit(swapped)(jnp.ones(2))


def test_probe_compares_kernels_in_x_and_inside_of_rules():
    point = bf.Variables(jnp.ones(2), jnp.ones(2), jnp.ones(2))

    def found(function):
        loss = lambda z, x, batch: jnp.sum(function(z, x) ** 2)
        return oracles.probe(bf.Problem(loss, loss), point, None)

    deaf = oracles.with_reference(lambda z, x: z * x, lambda z, x: z * jax.lax.stop_gradient(x))
    with pytest.raises(ValueError, match="differ: its gradient in outer_params, leaf 0"):
        found(deaf)
    other = oracles.with_reference(lambda z, x: z * x, lambda z, x: 2 * z * x)
    ruled = jax.custom_jvp(lambda z, x: other(z, x))
    ruled.defjvp(lambda at, along: (ruled(*at), at[0] * along[1] + at[1] * along[0]))
    with pytest.raises(ValueError, match="differ: inner_loss by"):
        found(ruled)


def test_what_a_kernel_computes_in_counts_as_the_losss():
    """A kernel that rounds inside: float32 in, float32 out."""
    half = lambda a: jnp.tanh(a.astype(jnp.bfloat16)).astype(jnp.float32)
    lent = oracles.with_reference(half, jnp.tanh)
    loss = lambda z, x, batch: jnp.sum(lent(z) ** 2) * x
    problem = problem_of(loss)
    batch, z = bf.Batch(jnp.zeros(1), jnp.zeros(1)), jnp.linspace(0.1, 1.0, 5)
    point = bf.Variables(z, jnp.ones(5), jnp.float32(1))
    found = oracles.probe(problem, point, None)  # not refused: they differ by bfloat16's rounding
    assert found.stopped_by["finite_differences"] == "computations in bfloat16"
    # The penalty's second network stands as far away as bfloat16 asks for.
    penalised = oracles.evaluate_by_penalty(problem, point, batch).oracles.hvp
    exact = oracles.evaluate(problem, point, batch).hvp
    assert jnp.linalg.norm(penalised - exact) < 0.2 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("side", ["inner", "outer"])
@pytest.mark.parametrize("method", ["soba", "first_order", "unrolled", "finite_differences"])
def test_a_step_names_the_loss_and_what_stops_its_gradient(side, method):
    point = bf.Variables(jnp.ones(2), jnp.ones(2), jnp.ones(()))
    never = {  # in z, and in x alone
        "while": lambda z, x: jnp.sum(
            jax.lax.while_loop(lambda a: jnp.sum(a) < 9, lambda a: 2 * a, z) * x
        ),
        "pure_callback": lambda z, x: jnp.sum(z**2) * jax.pure_callback(np.sin, x, x),
    }
    for name, bad in never.items():
        good = lambda z, x, batch: jnp.sum((z - x * batch) ** 2)
        losses = {side: lambda z, x, batch, bad=bad: bad(z, x)}
        pair = [losses.get(each, good) for each in ("inner", "outer")]
        mode = {"derivatives": method} if method == "finite_differences" else {}
        build = {"first_order": bf.first_order, "unrolled": bf.unrolled}.get(method, bf.soba)
        more = {"steps": 9} if build is bf.first_order else {"outer": optax.sgd(0.1)}
        solver = build(bf.Problem(*pair, **mode), inner=optax.sgd(0.1), **more)
        shape = (10, 2) if build is bf.unrolled else (2,)
        batch = bf.Batch(jnp.ones(shape), jnp.ones((1, 2) if build is bf.unrolled else 2))
        with pytest.raises(
            TypeError, match=f"^{side}_loss cannot be .* once.* {name} stops"
        ) as told:
            jax.jit(solver.update)(solver.init(point.inner, point.outer), batch)
        assert "\n" not in str(told.value)


def test_probe_says_what_was_not_handed_to_it():
    point = bf.Variables(jnp.ones(2), jnp.ones(2), jnp.ones(()))
    loss = lambda z, x, batch: jnp.sum(z * batch) * x
    problem = bf.Problem(loss, loss)
    with pytest.raises(
        TypeError, match=r"given batch=None: hand over its minibatch, bf\.Batch\(inner"
    ):
        oracles.probe(problem, point, None)
    with pytest.raises(
        ValueError, match="batch has jax.ShapeDtypeStruct leaves: probe needs arrays"
    ):
        oracles.probe(problem, point, jax.ShapeDtypeStruct((2,), jnp.float32))
    stateful = lambda z, x, b, state, rng: (jnp.sum(z * state["scale"]) * x, bf.Aux(state))
    with pytest.raises(TypeError, match="given model_state=None: pass model_state="):
        oracles.probe(bf.Problem(stateful, stateful, stateful=True), point, jnp.ones(2))


def dense_attention(q, k, v, bias=0.0, seen=True, scale=None):
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, logits + bias, -1e30)), v)


ROWS, COLUMNS = np.arange(7)[:, None], np.arange(7)[None]
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])
MASK = RNG.random((2, 1, 7, 7)) < 0.7
MASK |= np.eye(7, dtype=bool)
BIAS = RNG.normal(size=(1, 4, 7, 7))
MASKS = {
    "window": (
        {"local_window_size": (2, 1)},
        {"seen": (COLUMNS >= ROWS - 2) & (COLUMNS <= ROWS + 1)},
    ),
    "causal, mask, bias": (
        {"mask": MASK, "bias": BIAS, "is_causal": True},
        {"seen": MASK & (COLUMNS <= ROWS)[None, None], "bias": BIAS},
    ),
    "segments, lengths": (
        {"segment_ids": (SEGMENTS, SEGMENTS), "key_value_seq_lengths": np.array([5, 7])},
        {
            "seen": (SEGMENTS[:, :, None] == SEGMENTS[:, None])[:, None]
            & (np.arange(7)[None] < np.array([[5], [7]]))[:, None, None]
        },
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_chunked_attention_is_attention_twice_differentiable(x64, name):
    settings, dense = MASKS[name]
    if "seen" in dense and dense["seen"].ndim == 2:
        dense = {**dense, "seen": dense["seen"][None, None]}
    q = RNG.normal(size=(2, 7, 4, 3))
    k, v = RNG.normal(size=(2, 2, 7, 2, 3))

    def second(function):
        gradient = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v))), (0, 1, 2))
        return jax.jit(lambda: (function(q, k, v), jax.jvp(gradient, (q, k, v), (q, v, k))))()

    ours = second(functools.partial(oracles.chunked_attention, chunk=3, **settings))
    theirs = second(functools.partial(dense_attention, **dense))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_values_of_another_width_and_a_bias_of_a_pallas_kernel(x64):
    q, k, v = (RNG.normal(size=(2, 3, 5, width)) for width in (4, 4, 2))  # [batch, heads, ...]
    bias = RNG.normal(size=(2, 3, 5, 5))

    def flash(q, k, v, ab=None, segment_ids=None):
        logits = jnp.einsum("bntd,bnsd->bnts", q, k)
        logits = 0.5 * (logits if ab is None else logits + ab)
        if segment_ids is not None:
            same = segment_ids.q[:, :, None] == segment_ids.kv[:, None]
            logits = jnp.where(same[:, None], logits, -1e30)
        return jnp.einsum("bnts,bnsd->bntd", jax.nn.softmax(logits), v)

    ids = SegmentIds(SEGMENTS[:, :5], SEGMENTS[:, :5])
    lent = oracles.pallas_attention(flash, scale=0.5, chunk=2)
    for args in ((), (bias,), (bias, ids), (None, ids)):
        lent.check(q, k, v, *args)
    lent.check(q, k, v, segment_ids=ids, ab=bias)


WRONG = {
    "a mask of integers": ({"mask": np.ones((1, 1, 4, 6), int)}, "mask has dtype int64, but must"),
    "a mask of keys": (
        {"mask": np.ones((2, 6), bool)},
        r"mask has shape \(2, 6\), .* mask\[:, None",
    ),
    "a bias of other heads": ({"bias": np.ones((1, 3, 4, 6))}, r"bias has shape .* \(2, 4, 4, 6\)"),
    "a window of a list": ({"local_window_size": [1, 2]}, r"local_window_size=\[1, 2\] must be"),
    "three heads of keys": ({"heads": 3}, "the number of key heads must divide"),
    "batches that differ": ({"batch": 1}, "must have one batch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_attention_refuses_what_would_be_computed_as_something_else(name):
    settings, message = WRONG[name]
    shape = settings.pop("batch", 2), 6, settings.pop("heads", 2), 3
    q, k = jnp.ones((2, 4, 4, 3)), jnp.ones(shape)
    with pytest.raises((TypeError, ValueError), match=message):
        oracles.chunked_attention(q, k, k, **settings)


def test_chunked_attentions_memory_is_linear_in_length():
    def temporary(function, length):
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        gradient = jax.grad(lambda q: jnp.sum(function(q, q, q) ** 2))
        product = jax.jit(lambda q: jax.jvp(gradient, (q,), (q,))[1])
        return product.lower(q).compile().memory_analysis().temp_size_in_bytes

    chunked = functools.partial(oracles.chunked_attention, is_causal=True, chunk=64)
    whole = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    small, large = (temporary(chunked, length) for length in (256, 1024))
    assert large < 4.5 * small
    assert large < temporary(whole, 1024) / 4


def test_soba_runs_on_pallas_splash_attention_in_interpret_mode():
    heads, length, width = 2, 128, 128
    blocks = dict.fromkeys(splash.BlockSizes.__dataclass_fields__, 128)
    for name in ("use_fused_bwd_kernel", "q_layout", "k_layout", "v_layout"):
        blocks.pop(name)
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=splash.BlockSizes(**blocks), interpret=True
    )

    def problem(attention):
        def loss(z, x, batch):
            a = jax.vmap(attention)(batch @ z, batch, batch)
            return jnp.mean(a**2) * jnp.exp(x)

        return problem_of(loss)

    def dense(q, k, v):
        swapped = (a.swapaxes(0, 1)[None] for a in (q, k, v))
        seen = np.tri(length, dtype=bool)[None, None]
        return dense_attention(*swapped, seen=seen, scale=1.0)[0].swapaxes(0, 1)

    z = jnp.asarray(RNG.normal(size=(width, width)) / 20, jnp.float32)
    point = bf.Variables(z, jnp.ones_like(z), jnp.float32(0.3))
    batch = jnp.asarray(RNG.normal(size=(1, heads, length, width)) * 0.3, jnp.float32)
    stopped = oracles.probe(problem(kernel), point, batch)
    assert "pallas_call 'splash_mha_fwd" in stopped.stopped_by["forward_over_reverse"]
    assert stopped.mode == "finite_differences"
    lent = problem(oracles.pallas_attention(kernel, is_causal=True))
    mine, theirs = (
        jax.jit(functools.partial(oracles.evaluate, each))(point, bf.Batch(batch, batch))
        for each in (lent, problem(dense))
    )
    for ours, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert jnp.linalg.norm(ours - other) <= 2e-5 * jnp.linalg.norm(other)


def test_a_kernel_inside_shard_map(x64):
    mesh = bf.sharding.make_mesh("data=2", jax.devices()[:2])
    everywhere, cut = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    w, along = POINT.inner["w"], POINT.adjoint["w"]

    def product(function):
        def on_share(w, a):
            loss = lambda w: jnp.sum(function(a, w, jnp.int32(2))[0] ** 2)
            return jax.lax.psum(jax.jvp(jax.grad(loss), (w,), (along,))[1], "data")

        shared = jax.shard_map(
            on_share, mesh=mesh, in_specs=(everywhere, cut), out_specs=everywhere
        )
        return jax.jit(shared)(w, BATCH)

    kernel = jax.custom_vjp(plain)
    kernel.defvjp(
        lambda *args: (plain(*args), args),
        lambda args, c: (*jax.vjp(lambda a, w: plain(a, w, args[2]), *args[:2])[1](c), None),
    )
    lent = oracles.with_reference(kernel, plain)
    np.testing.assert_allclose(product(lent), product(plain), rtol=1e-12)
