"""Text is cut without leaks, streams go on where they were, mistakes are named in a line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.checks import UserError
from bilevel_flax.data import draws
from bilevel_flax.outer.data_mixture import comb
from bilevel_flax.train import config as configs
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.step_runner import StepRunner
from examples.lm_data_mixing import (
    baselines,
    classifier,
    curriculum,
    reference,
    report,
    rivals,
    stream,
    task,
)
from examples.lm_data_mixing.alignment import gradient_alignment

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "lm_data_mixing.py")
SHARES = {"outer": 0.1, "validation": 0.2, "test": 0.2}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two domains of noise, and no others."""
    monkeypatch.delenv("BILEVEL_FLAX_DATA", raising=False)
    rng = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 128)):
        (tmp_path / f"{name}.bin").write_bytes(bytes(rng.integers(low, low + 128, 40_000).tolist()))
    return tmp_path


def config_of(files: Path, *overrides: str):
    own = [f"domains.{name}={files / f'{name}.bin'}" for name in "ab"]
    return configs.load(CONFIG, [*own, "data.outer_share=0.03", *overrides])


def noise(domains: int = 3) -> dict[str, stream.Windows]:
    rng = np.random.default_rng(1)
    return {
        str(k): stream.windows(rng.integers(0, 256, 200 + 300 * k).astype(np.uint8), 10, "x")
        for k in range(domains)
    }


def test_any_bytes_will_do_and_parts_of_the_target_share_nothing(files: Path):
    texts = task.load_texts(config_of(files, "target=b", "target_in_mixture=true"))
    assert list(texts.domains) == ["a", "b"]
    parts = [part.all() for part in texts.target]
    assert [len(part) for part in parts] == [19, 50, 62, 493]
    assert parts[0].min() >= 128  # b alone; none of its bytes is UTF-8
    rows = [row.tobytes() for part in parts for row in part]
    assert len(set(rows)) == len(rows) == 624
    assert len(texts.domains["b"]) == 493
    with pytest.raises(ConfigError, match="1 domain to train on"):
        task.load_texts(config_of(files, "target=b", "target_in_mixture=false"))


def test_a_target_of_ones_own_is_no_domain(files: Path):
    path = files / "own.txt.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\xff\x00 nothing that anyone could decode \xc3" * 400)
    texts = task.load_texts(config_of(files, f"target={path}", "data.outer_share=0.2"))
    assert list(texts.domains) == ["a", "b"]
    assert texts.name == "own"
    assert len(texts.target.outer) == pytest.approx(0.2 * 37 * 400 / 64, abs=1)


@pytest.mark.parametrize(
    ("make", "overrides", "says"),
    [
        (b"", ["domains.c={}"], "--config.domains.c={}: the file is empty"),
        (b"short", ["domains.c={}"], "--config.domains.c: 5 bytes are too few"),
        (None, ["domains.c={}"], "--config.domains.c={}: No such file"),
        (b"not packed", ["domains.c={}.gz"], "No such file"),
        (None, ["target=c"], "--config.target=c: neither a file nor a domain (a, b)"),
        (b"x" * 2000, ["target={}"], "fewer than one batch of 8: give more text"),
        (b"", ["target={}"], "--config.target={}: the file is empty"),
        (None, ["data.outer_share=0"], "--config.data.outer_share=0.0: must lie in (0, 1)"),
        (None, ["data.test_share=0.95"], "are more than all of the target's text"),
        (None, ["domains.b=none"], "a mixture needs two"),
        (None, ["domains.a=none", "domains.b=none", "default_domains=false"], "there are none"),
    ],
)
def test_a_bad_input_is_a_line(files: Path, make, overrides, says):
    path = files / "given"
    if make is not None:
        path.write_bytes(make)
    config = config_of(files, *(text.format(path) for text in overrides))
    with pytest.raises(ConfigError) as caught:
        task.load_texts(config)
    assert says.format(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("mixture=domain", "choose curriculum, domains or network"),
        ("use=sample", "choose sampling or weighting"),
        ("oversampling=0", "must be an integer >= 1, got 0"),
        ("batch_size=0", "must be an integer >= 1, got 0"),
        ("size=tinny", 'did you mean "tiny"'),
    ],
)
def test_a_bad_setting_is_a_line(files: Path, override: str, says: str):
    with pytest.raises(UserError, match=says):
        task.make_task(config_of(files, override))


def test_a_packed_file_that_is_none_is_a_line(files: Path):
    (files / "c.gz").write_bytes(b"not packed at all")
    with pytest.raises(ConfigError, match=r"c\.gz: Not a gzipped file"):
        task.load_texts(config_of(files, f"domains.c={files / 'c.gz'}"))


def test_candidates_are_a_function_of_their_number_and_miss_no_window():
    domains = noise()
    side = stream.candidates(domains, 6, seed=3)
    assert side.batches["domain"][:].tolist() == [[0, 1, 2] * 2] * side.num_batches
    again = stream.candidates(domains, 6, seed=3)
    last = side.num_batches - 1
    np.testing.assert_array_equal(again.batches["tokens"][last], side.batches["tokens"][last])
    assert (
        stream.candidates(domains, 6, seed=4).batches["tokens"][0] != side.batches["tokens"][0]
    ).any()
    read = side.batches["tokens"][:].reshape(-1, 3, 11)[:, 2]  # of the largest domain
    everything = {row.tobytes() for row in domains["2"].all()}
    assert {row.tobytes() for row in read} == everything
    assert len(read) <= len(everything) + 2


def toy_problem() -> bf.Problem:
    """A number for each byte; F wants them as the domains' own."""
    mixture = bf.outer.domain_weights(3)

    def losses(z, batch):
        return ((z[batch["tokens"].astype(jnp.int32)] - batch["domain"][:, None]) ** 2).mean(-1)

    def inner_loss(z, x, batch, model_state, rng):
        chosen = bf.outer.select(rng, mixture.weights(x, batch), 2)
        picked = jax.tree.map(lambda leaf: leaf[chosen.index], batch)
        return jnp.mean(chosen.ratio * losses(z, picked)), bf.Aux(model_state=model_state)

    def outer_loss(z, x, batch, model_state, rng):
        return jnp.mean((z[batch["tokens"].astype(jnp.int32)] - 2.0) ** 2), bf.Aux()

    return bf.Problem(inner_loss, outer_loss, stateful=True)


def test_a_resumed_stream_goes_on_as_the_uninterrupted_one():
    solver = bf.soba(toy_problem(), inner=optax.sgd(0.3), outer=optax.sgd(0.1))
    outer = data.partition({"tokens": noise(1)["0"].all()}, 4)

    def loop():
        return StepRunner(solver, stream.candidates(noise(), 6, seed=3), outer, seed=1, capacity=40)

    def run(state, start, stop, through):
        while start < stop:
            state, info = through.run(state, start, stop)
            start += len(info.inner_loss)
        through.close()
        return state

    state = solver.init(jnp.zeros(256), jnp.zeros(3), rng=jax.random.PRNGKey(2))
    copy = jax.tree.map(jnp.copy, state)
    whole = run(state, 0, 70, loop())  # over the end of a chunk and of an epoch
    half = run(copy, 0, 33, loop())
    resumed = run(jax.tree.map(jnp.asarray, jax.device_get(half)), 33, 70, loop())
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert float(jnp.abs(whole.outer_params).max()) > 0


def test_alignment_moves_x_as_a_step_of_z_says():
    """The direction of x is the slope of F(z - ε∇₁G(z, x)) in x, over ε."""
    mixture = bf.outer.domain_weights(3)
    tokens = jnp.asarray(noise(1)["0"].all()[:6]).astype(jnp.int32)
    batch = {"tokens": tokens, "domain": jnp.array([0, 1, 2] * 2)}

    def losses(z, batch):
        return ((z[batch["tokens"]] - batch["domain"][:, None]) ** 2).mean(-1)

    def inner_loss(z, x, batch, model_state, rng):
        return jnp.mean(mixture.weights(x, batch) * losses(z, batch)), bf.Aux(model_state)

    def outer_loss(z, x, batch, model_state, rng):
        return jnp.mean((z[batch["tokens"]] - 2.0) ** 2), bf.Aux()

    problem = bf.Problem(inner_loss, outer_loss, stateful=True)
    solver = gradient_alignment(problem, inner=optax.sgd(0.1), outer=optax.sgd(1.0))
    z, x = jnp.linspace(-1.0, 1.0, 256), jnp.array([0.1, 0.5, -0.2])
    state = solver.init(z, x, model_state={})
    moved, _ = jax.jit(solver.update)(state, bf.Batch(batch, {"tokens": tokens}))

    def after_a_step(x):
        step = jax.grad(lambda z: inner_loss(z, x, batch, {}, None)[0])(z)
        return outer_loss(z - 1e-3 * step, x, {"tokens": tokens}, {}, None)[0]

    slope = jax.jit(jax.grad(after_a_step))(x) / 1e-3
    np.testing.assert_allclose(x - moved.outer_params, slope, rtol=0.02, atol=1e-6)


def test_the_classifier_knows_the_targets_text():
    rng = np.random.default_rng(0)
    prose, code = (
        rng.choice(list(letters), (400, 40)).astype(np.uint8)
        for letters in (b"abcdefgh      ", b"abcd(){}=;::")
    )
    weights = classifier.fit(prose[:50], np.concatenate([prose[50:100], code[:100]]))
    scores = classifier.score(weights, np.concatenate([prose[100:], code[100:]]))
    assert (scores[:300] > np.median(scores)).mean() > 0.95


def test_the_hosts_comb_is_the_devices():
    weights = np.random.default_rng(0).uniform(0, 2, 24)
    mine = baselines._comb(weights, 8, 5, 7)
    offset = draws.uniform(1, 5, baselines._COMB, 7)[0]
    assert mine.tolist() == comb(offset, jnp.asarray(weights), 8).index.tolist()


def test_the_sample_is_read_in_whole_passes():
    sample = np.arange(12).reshape(6, 2)
    read = baselines._passes(sample, np.arange(18), seed=0)
    for part in np.split(read, 3):
        assert sorted(part[:, 0].tolist()) == sample[:, 0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("mixture=network", "use=weighting", "batch_size=8")])
def test_a_whole_run(files: Path, more):
    """The command line, from files to report; 60 and 30 seconds."""
    own = [f"--config.domains.{name}={files / f'{name}.bin'}" for name in "ab"]
    settings = ["steps=20", "eval_every=10", "target=b", "finetune.steps=5", *more]
    command = [sys.executable, "-m", "bilevel_flax.cli", "train", "--config", CONFIG]
    command += ["--workdir", str(files / "run"), *own, *(f"--config.{text}" for text in settings)]
    subprocess.run(command, check=True, cwd=ROOT)
    summary = json.loads((files / "run" / "summary.json").read_text())
    assert set(summary["nats_per_byte"]) == set(baselines.METHODS)
    for pair in summary["nats_per_byte"].values():
        assert 0 < pair["after"] < pair["before"] + 0.1 < 5.7
    assert sum(summary["mixture"].values()) == pytest.approx(1.0, rel=1e-4)
    assert len(report.sections(files / "run")) == 4


def test_half_of_the_sample_is_fs_until_x_is_learned(files: Path):
    config = config_of(files, "target=b", "solver.cooldown=0.5")
    texts = task.load_texts(config)
    sources = task.make_sources(config, texts)
    assert sources.names == ["a", "b", task.SAMPLE]
    assert sources.domain.tolist() == [0, 1, 2, 2]
    of_inner, whole, of_outer, sample = (
        {row.tobytes() for row in windows.all()}
        for windows in (*sources.inner[2:], sources.outer, texts.target.outer)
    )
    assert not of_inner & of_outer
    assert of_inner | of_outer == whole == sample
    batch = {"domain": jnp.array([0, 1, 2, 2]), "part": jnp.array([0, 0, 0, 1])}
    batch["tokens"] = jnp.asarray(np.stack([half.all()[0] for half in sources.inner]))
    x = sources.mixture.init()
    weights_at, shares_at = jax.jit(sources.mixture.weights), jax.jit(sources.mixture.shares)
    for at in (0.0, 0.3, 0.49, 0.5, 0.8, 1.0):
        weights = np.asarray(weights_at(x, {**batch, "progress": at})) / 4
        assert weights[2 if at >= 0.5 else 3] == 0
        shares = np.asarray(shares_at(x, {**batch, "progress": at}))
        np.testing.assert_allclose(np.bincount([0, 1, 2, 2], weights), shares, atol=1e-4)
    weights = sources.plain.weights(sources.plain.init(), batch)
    np.testing.assert_allclose(np.asarray(weights) / 4, [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"--config\.domains\.sample: this is the name of"):
        named = config_of(files, "target=b", f"domains.sample={files / 'a.bin'}")
        task.make_sources(named, task.load_texts(named))


def noisy_text(letters: bytes, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(list(letters), (count, 33)).astype(np.uint8)


def test_the_decoder_for_pods_learns_the_same_mixture(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BILEVEL_FLAX_DATA", raising=False)
    pod = str(Path(CONFIG).with_name("lm_pod.py"))
    config = configs.load(f"{pod}:tiny,curriculum", ["target=docstrings", "target_in_mixture=true"])
    made = task.make_task(config)
    x = made.init(jax.random.PRNGKey(0)).outer_params
    assert x["shares"].shape == (3,)  # source, docstrings, and the sample
    assert made.inner.batches["tokens"].shape[1:] == (4 * config.batch_size, config.length + 1)
    assert config.solver.cooldown == configs.load(CONFIG).solver.cooldown
    assert "mixture" not in configs.load(f"{pod}:tiny")
    with pytest.raises(ConfigError, match="1b does not fit there: choose tiny or small"):
        configs.load(f"{pod}:1b,curriculum")


def test_the_reference_knows_where_the_targets_text_is():
    target, near, far = b"abcdefgh      ", b"abcdefgh....  ", b"0123456789++--"
    pool = [noisy_text(near, 200, 0), noisy_text(far, 200, 1)]
    halves = [noisy_text(target, 20, 2), noisy_text(target, 20, 3)]
    left_out = reference.fit(pool, halves)
    assert left_out.shares[2] > 0.9
    assert left_out.shares.sum() == pytest.approx(1)
    inside = reference.fit([*pool, noisy_text(target, 200, 4)], halves)
    assert inside.shares[2] > 0.9
    assert inside.shares[3] < 0.05
    # Of a domain as small as that only so much is read; the rest is the target's.
    small = reference.fit([*pool, noisy_text(target, 200, 4)], halves, np.array([1.0, 1.0, 0.2]))
    assert small.shares[2] == pytest.approx(0.2)
    assert small.shares[3] == pytest.approx(1 - small.shares[:3].sum())
    assert small.spent.tolist() == [False, False, True]


@pytest.mark.parametrize("share", [0.05, 0.4, 0.5, 0.7, 3.0])
def test_the_sample_is_read_as_often_as_it_may(share: float):
    known = reference.Reference(np.array([0.1, 0.0, 0.9]), np.zeros(256**2), np.zeros(2, bool))
    rises = reference.rise(known, share)
    assert (np.diff(rises) >= -1e-12).all()
    assert rises[-1] == pytest.approx(max(0.5, min(1, 2 * share / 0.9)))
    assert rises[0] == pytest.approx(0, abs=1e-9)
    assert 0.9 * rises.mean() == pytest.approx(min(share, 0.45), rel=0.15 if share < 0.1 else 0.02)


def test_windows_that_look_like_the_target_are_read_whatever_their_domain():
    """Near the best k of the candidates, none of them twice, and nearer with x."""
    table = np.zeros(256**2)
    table[ord("a") * 256 + ord("b")] = 1.0
    texts = (b"ababab", b"xxxxab", b"xxxxxx", b"abxxab", b"xxxxxx", b"xabxxx")
    pool = np.stack([np.frombuffer(text, np.uint8) for text in texts])
    score = curriculum.scores(table, pool)
    np.testing.assert_allclose(np.mean(score(pool)), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(score(pool)), 1, rtol=1e-5)
    mixture = curriculum.curriculum(
        np.array([0.0, 0.0, 1.0]),
        np.zeros(2),
        np.array([True, True]),
        score,
        rate=0.25,
        released=1.0,
        temperature=1.0,
    )
    batch = {
        "tokens": jnp.asarray(np.concatenate([pool, pool[:2]])),
        "domain": jnp.array([0, 0, 0, 1, 1, 1, 2, 2]),
        "part": jnp.array([0, 0, 0, 0, 0, 0, 0, 1]),
        "progress": jnp.float32(0.3),
    }
    x = mixture.init()
    weights = jax.jit(mixture.weights)
    flat, steep = (
        np.asarray(weights(x | {"slope": jnp.float32(slope)}, batch)) / 8 for slope in (-3.0, 1.0)
    )
    for each in (flat, steep):
        assert each.sum() == pytest.approx(1, rel=1e-5)
        assert each.max() <= 0.5 + 1e-5
        assert not each[6:].any()
        assert each[0] >= each[3] > each[1] >= each[2]
    np.testing.assert_allclose(steep[[0, 3]], 0.5, atol=0.01)
    assert flat[0] < 0.4
    shares = mixture.shares(x | {"slope": jnp.float32(1.0)}, batch)
    np.testing.assert_allclose(shares, [0.5, 0.5, 0], atol=0.01)
    slope = jax.jit(jax.grad(lambda x: mixture.weights(x, batch)[0]))(x)
    assert slope["slope"] > 0
    assert jnp.isfinite(slope["shares"]).all()


def test_a_step_reads_the_mixture_of_its_time(files: Path):
    left_out = ("target=b", "target_in_mixture=false", f"domains.c={files / 'a.bin'}")
    small = ("steps=8", "batch_size=2", "length=8", "data.outer_share=0.001")
    made = task.make_task(config_of(files, *left_out, *small))
    values = made.init(jax.random.PRNGKey(0))
    batch = {name: leaf[0] for name, leaf in made.inner.batches.items()}
    loss = jax.jit(made.problem.inner_loss)
    at = {}
    for step in (0, 7):
        state = {"step": jnp.int32(step)}
        rng = jax.random.PRNGKey(1)
        at[step], aux = loss(values.inner_params, values.outer_params, batch, state, rng)
        assert int(aux.model_state["step"]) == step + 1
    assert float(at[0]) != float(at[7])


class _Plain(NamedTuple):
    params: Any


def rivals_kit(losses: np.ndarray, pool=(1.0, 1.0, 1.0)):
    """Runs that are their average mixture, and whose loss is linear in it."""
    pool = np.array(pool)
    trained, under_way = [], []

    def train(windows, steps):
        under_way.append(np.full(3, 1 / 3))
        mixtures = [windows(start, start + 25) for start in range(0, steps, 25)]
        trained.append(steps)
        return _Plain(np.mean(mixtures, axis=0))

    kit = rivals.Kit(
        steps=100,
        seed=0,
        train=train,
        params=lambda: under_way[-1],
        by_shares=lambda shares: lambda start, stop: np.asarray(shares()),
        direct=lambda share: lambda start, stop: np.array([share, 1 - share, 0.0]),
        # Of a domain's windows, which are its number: its loss; of the validation text: of the run.
        nats=lambda z, windows: float(
            losses @ z if windows.ndim == 0 else losses[int(windows[0])] * (1 + z[int(windows[0])])
        ),
        validation=np.array(0),
        looked_at=[np.array([k]) for k in range(3)],
        sizes=np.array([1, 3, 4]),
        pool=pool,
        options=config_dict.ConfigDict(
            {
                "direct_shares": (0.1, 0.5, 0.9),
                "doremi_rate": 1.0,
                "regmix_runs": 16,
                "regmix_share": 0.25,
            }
        ),
    )
    return kit, trained


def test_rivals_find_what_they_are_made_to_find_and_count_what_they_cost():
    losses = np.array([3.0, 1.0, 2.0])
    kit, trained = rivals_kit(losses)
    run = rivals.proportional(kit)
    np.testing.assert_allclose(run.plain.params, [1 / 8, 3 / 8, 4 / 8])
    assert run.cost == sum(trained) == 100
    kit, trained = rivals_kit(losses)
    run = rivals.direct_mix_tuned(kit)
    assert run.notes == {"share": 0.1}
    assert run.cost == sum(trained) == 300
    kit, trained = rivals_kit(losses)
    run = rivals.regmix(kit)
    assert run.mixture.argmax() == 1
    assert run.mixture[1] > 0.7
    assert run.cost == sum(trained) == 16 * 25 + 100
    kit, trained = rivals_kit(losses)
    run = rivals.online(kit)
    assert run.mixture.argmax() == 0  # where the loss is high, for it knows of no target
    np.testing.assert_allclose(run.mixture.sum(), 1)
    kit, trained = rivals_kit(losses)
    run = rivals.doremi(kit)
    np.testing.assert_allclose(run.mixture.sum(), 1)
    assert sum(trained) == 300 < run.cost < 310


@pytest.mark.parametrize("name", ["proportional", "online", "doremi"])
def test_who_knows_of_no_target_does_not_read_its_sample(name: str):
    kit, _ = rivals_kit(np.array([3.0, 1.0, 2.0]), pool=(1.0, 1.0, 0.0))
    mixture = rivals.RIVALS[name](kit).mixture
    assert mixture[2] == 0
    np.testing.assert_allclose(mixture.sum(), 1)
