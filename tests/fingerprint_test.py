"""The checksum sees what it must, and leaf names are one to one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_flax import fingerprint


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(["bool", "int8", "float16", "bfloat16", "float32", "float64", "uint64"]),
    size=st.sampled_from([1, 2, 7, 16384, 16385, 40_000]),
    data=st.data(),
)
def test_any_flipped_bit_shows(dtype: str, size: int, data: st.DataObject):
    width = jnp.dtype(dtype).itemsize
    array = np.random.default_rng(0).bytes(size * width)
    altered = bytearray(array)
    altered[data.draw(st.integers(0, size * width - 1))] ^= 1 << data.draw(st.integers(0, 7))
    before, after = (np.frombuffer(b, np.uint8).view(jnp.dtype(dtype)) for b in (array, altered))
    assert fingerprint.checksum(before) != fingerprint.checksum(after)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 50_000), data=st.data())
def test_two_exchanged_elements_show(size: int, data: st.DataObject):
    array = np.random.default_rng(1).permutation(size).astype(np.float32)
    pair = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    altered = array.copy()
    altered[pair] = array[pair[::-1]]
    assert fingerprint.checksum(array) != fingerprint.checksum(altered)


def test_changed_signs_show():
    # Changes of the highest bits alone: with 64-bit words two of them would cancel.
    for dtype in (np.float32, np.float64, np.complex128):
        array = np.ones(50, dtype)
        sums = {fingerprint.checksum(array)}
        for stop in range(1, 51):
            altered = array.copy()
            altered[:stop] *= -1
            sums.add(fingerprint.checksum(altered))
        assert len(sums) == 51


def test_order_in_memory_does_not_matter():
    array = np.arange(12.0).reshape(3, 4)
    assert fingerprint.checksum(array) == fingerprint.checksum(np.asfortranarray(array))
    assert fingerprint.checksum(array) != fingerprint.checksum(array.T)


def test_pieces_add_up_to_the_whole():
    # What checkpoints of arrays in several processes will stand on.
    array = np.random.default_rng(2).normal(size=30_000).astype(np.float32)
    total = 0
    for start in range(0, array.size, 7_000):
        piece = np.zeros_like(array)
        piece[start : start + 7_000] = array[start : start + 7_000]
        total += int(fingerprint.checksum(piece), 16)
    assert f"{total % 2**64:016x}" == fingerprint.checksum(array)


def test_names_are_paths_and_never_collide():
    tree = {"a": {"b.c": 1, "b": {"c": 2}, "b/c": 3, "b%2Ec": 4}, "t": (5, [6])}
    names = fingerprint.named_leaves(tree)
    assert names == {
        "a.b.c": 2,
        "a.b%252Ec": 4,
        "a.b%2Ec": 1,
        "a.b%2Fc": 3,
        "t.0": 5,
        "t.1.0": 6,
    }


def test_equal_names_are_refused():
    class Twins:
        pass

    jax.tree_util.register_pytree_with_keys(
        Twins,
        lambda _: (((jax.tree_util.GetAttrKey("x"), 1), (jax.tree_util.GetAttrKey("x"), 2)), None),
        lambda *_: Twins(),
    )
    with pytest.raises(ValueError, match="two leaves are named 'x'"):
        fingerprint.named_leaves(Twins())
