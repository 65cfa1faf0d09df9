"""The decoder is causal, its losses decompose, its text is cut without gaps."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_flax as bf
from bilevel_flax.sharding import param_specs
from bilevel_flax.train.config import ConfigError
from examples.language_model import text
from examples.language_model.model import RULES, SIZES, Decoder, make_model, rotated
from examples.language_model.task import adamw, make_problem

SMALL = dataclasses.replace(SIZES["tiny"], width=32, heads=2, hidden=48, vocabulary=50)
TOKENS = np.random.default_rng(0).integers(0, 50, (4, 13))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(SMALL, jnp.float32)


@pytest.fixture(scope="module")
def params(model: Decoder):
    return jax.jit(model.init)(jax.random.PRNGKey(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def losses(model: Decoder, params):
    apply = jax.jit(model.apply)
    return lambda tokens: np.asarray(apply({"params": params}, tokens))


def test_no_token_sees_what_follows(losses):
    changed = TOKENS.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % 50
    before, after = losses(TOKENS), losses(changed)
    np.testing.assert_allclose(before[:, :7], after[:, :7], rtol=1e-5)
    assert np.abs(before[:, 8:] - after[:, 8:]).min(0).max() > 1e-3


def test_losses_start_near_those_of_a_guess(losses):
    found = losses(TOKENS)
    assert found.shape == (4, 12)
    assert found.dtype == np.float32
    assert found.mean() == pytest.approx(np.log(50), abs=0.7)


def test_rotary_products_depend_on_distance_only():
    rng = np.random.default_rng(1)
    query, key = (np.broadcast_to(rng.normal(size=8), (1, 6, 1, 8)) for _ in range(2))
    turned = jnp.einsum("bqhs,bkhs->qk", rotated(jnp.asarray(query)), rotated(jnp.asarray(key)))
    np.testing.assert_allclose(turned[2, 1], turned[5, 4], rtol=1e-4)
    assert abs(float(turned[2, 1] - turned[4, 1])) > 1e-3


def test_equal_logits_weigh_all_domains_alike(model: Decoder, params, losses):
    inner_loss = jax.jit(make_problem(model, bf.outer.domain_weights(3)).inner_loss)
    batch = {"tokens": jnp.asarray(TOKENS), "domain": jnp.array([0, 1, 2, 1])}
    windows = losses(TOKENS).mean(-1)
    equal = inner_loss(params, jnp.zeros(3), batch)
    assert float(equal) == pytest.approx(windows.mean(), rel=1e-5)
    only = inner_loss(params, jnp.array([50.0, 0.0, 0.0]), batch)
    assert float(only) == pytest.approx(3 * windows[0] / 4, rel=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_what_it_is_called_and_can_be_cut(name: str):
    shapes = jax.eval_shape(
        lambda: make_model(name, "bfloat16", True).init(
            jax.random.PRNGKey(0), jnp.zeros((1, 9), jnp.int32)
        )["params"]
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9
    assert count == pytest.approx(
        {"micro": 7.4e-5, "tiny": 1.4e-4, "small": 9.77e-3, "1b": 1.06, "7b": 6.74}[name], rel=0.02
    )
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
    specs = param_specs(shapes, mesh, RULES)
    cut = [s for s in jax.tree.leaves(specs) if any(axis is not None for axis in s)]
    assert len(cut) == len(RULES) + 3  # query, key and value share a rule, gate and up do


def test_decay_spares_the_norms():
    params = {"mlp_norm": {"scale": jnp.ones(3)}, "down": {"kernel": jnp.ones((3, 3))}}
    transform = adamw(1.0, 100)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for _ in range(3):  # the first step of the warm-up is 0
        moved, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert float(jnp.abs(moved["mlp_norm"]["scale"]).max()) == 0
    assert float(jnp.abs(moved["down"]["kernel"]).max()) > 0


def test_windows_lie_side_by_side_and_overlap_only_where_they_must():
    tokens = np.arange(41)
    cut = text.windows(tokens, 10, 1, "numbers")
    assert cut[:, 0].tolist() == [0, 10, 20, 30]
    assert (cut[:-1, -1] == cut[1:, 0]).all()
    many = text.windows(tokens, 10, 12, "numbers")
    assert len(many) >= 12
    assert many.max() <= 40
    with pytest.raises(ConfigError, match="too few for 40 windows"):
        text.windows(tokens, 10, 40, "numbers")


def test_the_targets_parts_share_nothing():
    domains = {"a": np.arange(100), "b": np.arange(100, 130)}
    parts = text.split(domains, "a", 0.1)
    assert [len(p) for p in (parts.mixture["a"], parts.outer, parts.held_out)] == [80, 10, 10]
    joined = np.concatenate([parts.mixture["a"], parts.outer, parts.held_out])
    assert joined.tolist() == list(range(100))
    mixed = text.mixture(parts.mixture, 9, 8)
    assert len(mixed.tokens) == len(mixed.domain) >= 8
    assert ((mixed.tokens >= 100).all(1) == (mixed.domain == 1)).all()
    with pytest.raises(ConfigError, match="choose one of a, b"):
        text.split(domains, "c", 0.1)


def test_files_are_bytes_or_tokens(tmp_path: Path):
    (tmp_path / "plain.txt").write_bytes(b"ab\xff")
    with gzip.open(tmp_path / "packed.txt.gz", "wb") as file:
        file.write(b"xyz")
    np.save(tmp_path / "own.npy", np.arange(300, dtype=np.uint16))
    names = [str(tmp_path / name) for name in ("plain.txt", "packed.txt.gz", "own.npy")]
    found = text.load(names)
    assert found["plain"].tolist() == [97, 98, 255]
    assert bytes(found["packed"]) == b"xyz"
    assert found["own"].max() == 299
    (tmp_path / "empty.txt").touch()
    for name, says in (("empty.txt", "empty"), ("gone.txt", "No such file")):
        with pytest.raises(ConfigError, match=says):
            text.read(tmp_path / name, "--config.data.files")


def test_there_is_always_some_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BILEVEL_FLAX_DATA", raising=False)
    found = text.load(None)
    assert set(found) == {"source", "docstrings"}
    assert all(len(tokens) > 50_000 for tokens in found.values())


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_a_data_folder_without_text_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BILEVEL_FLAX_DATA", str(tmp_path / folder))
    with pytest.raises(ConfigError, match=f"BILEVEL_FLAX_DATA={tmp_path}.*nor any other text"):
        text.load(None)
