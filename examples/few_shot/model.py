"""A small convolutional network for 28 x 28 drawings, as matrix products of patches.

A convolution whose kernels differ from task to task is a slow one; as patches times a matrix the
tasks are one axis more of a batched matrix product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
BLOCKS = 4


def init(rng: jax.Array, width: int, ways: int) -> Params:
    """The parameters: four strided blocks, then a linear layer on 2 x 2 positions."""
    params, channels = {}, 1
    for block, key in enumerate(jax.random.split(rng, BLOCKS)):
        scale = jnp.sqrt(2 / (9 * channels))
        params[f"kernel{block}"] = scale * jax.random.normal(key, (9 * channels, width))
        params[f"bias{block}"] = jnp.zeros(width)
        channels = width
    return params | {"head": jnp.zeros((4 * width, ways)), "head_bias": jnp.zeros(ways)}


def apply(params: Params, images: jax.Array) -> jax.Array:
    """Logits [batch, ways] of images [batch, 28, 28] in [0, 1]."""
    hidden = images[..., None]
    for block in range(BLOCKS):
        bias = params[f"bias{block}"][None, None, None]
        hidden = _patches(hidden) @ params[f"kernel{block}"] + bias
        hidden = jax.nn.relu(_normalised(hidden))
    return hidden.reshape(len(images), -1) @ params["head"] + params["head_bias"][None]


def _patches(images: jax.Array) -> jax.Array:
    """3 x 3 patches at every second position, [batch, h/2, w/2, 9 channels]."""
    height, width = ((side + 1) // 2 for side in images.shape[1:3])
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [
            padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
            for i in range(3)
            for j in range(3)
        ],
        -1,
    )


def _normalised(hidden: jax.Array) -> jax.Array:
    """Each image by its own mean and spread: no statistics that tasks would share."""
    axes = (1, 2, 3)
    centred = hidden - hidden.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)
