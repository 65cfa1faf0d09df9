"""The checksum sees what it must, and leaf names are one to one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_flax.checkpoints import checksum, records


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
    assert checksum.checksum(before) != checksum.checksum(after)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 50_000), data=st.data())
def test_two_exchanged_elements_show(size: int, data: st.DataObject):
    array = np.random.default_rng(1).permutation(size).astype(np.float32)
    pair = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    altered = array.copy()
    altered[pair] = array[pair[::-1]]
    assert checksum.checksum(array) != checksum.checksum(altered)


def test_changed_signs_show():
    # Changes of the highest bits alone: with 64-bit words two of them would cancel.
    for dtype in (np.float32, np.float64, np.complex128):
        array = np.ones(50, dtype)
        sums = {checksum.checksum(array)}
        for stop in range(1, 51):
            altered = array.copy()
            altered[:stop] *= -1
            sums.add(checksum.checksum(altered))
        assert len(sums) == 51


def test_order_in_memory_does_not_matter():
    array = np.arange(12.0).reshape(3, 4)
    assert checksum.checksum(array) == checksum.checksum(np.asfortranarray(array))
    assert checksum.checksum(array) != checksum.checksum(array.T)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from([(30_000,), (7, 5_000), (40, 6, 50), (3, 2, 5, 4), (16_384, 3), ()]),
    dtype=st.sampled_from(["bool", "bfloat16", "float32", "float64", "complex128"]),
    data=st.data(),
)
def test_pieces_add_up_to_the_whole(shape: tuple[int, ...], dtype: str, data: st.DataObject):
    # Shards, wherever they live: what checkpoints of arrays in several processes stand on.
    bytes_in_all = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    flat = np.frombuffer(np.random.default_rng(2).bytes(bytes_in_all), np.uint8)
    array = (flat & 1).view(dtype) if dtype == "bool" else flat.view(jnp.dtype(dtype))
    array = array.reshape(shape)
    cuts = [
        sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=2))})
        for length in shape
    ]
    total = 0
    for piece in itertools.product(*(itertools.pairwise(positions) for positions in cuts)):
        index = tuple(slice(*ends) for ends in piece)
        start = tuple(first for first, _ in piece)
        total += checksum.piece_sum(array[index], start, shape)
    assert checksum.as_checksum(total) == checksum.checksum(array)


def test_the_checksum_is_the_sum_that_the_docstring_says():
    # Checkpoints written by earlier versions must stay readable: the value itself is fixed.
    words = np.random.default_rng(3).integers(0, 2**32, 40_000, np.uint32)
    position = np.arange(len(words), dtype=np.uint64)
    block, inside = np.divmod(position, np.uint64(1 << 14))
    weights = checksum._odd_words(0, 1 << 14)[inside]
    weights = weights * checksum._odd_words(1 << 14, 3)[block]
    assert checksum.checksum(words) == f"{int((weights * words).sum()):016x}"
    assert checksum.checksum(np.arange(5, dtype=np.float32)) == "c359cd8f24400000"


def test_names_are_paths_and_never_collide():
    tree = {"a": {"b.c": 1, "b": {"c": 2}, "b/c": 3, "b%2Ec": 4}, "t": (5, [6])}
    names = records.named_leaves(tree)
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
        records.named_leaves(Twins())
