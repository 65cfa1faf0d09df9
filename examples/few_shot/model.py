"""A small convolutional network for drawings, as matrix products of patches.

A convolution whose kernels differ from task to task is a slow one; as patches times a matrix the
tasks are one axis more of a batched matrix product. Channels are normalised over the images at hand
(those of a task's support, or of its query), as in MAML: no statistics are kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
BLOCKS = 4


def init(rng: jax.Array, width: int) -> Params:
    """The parameters of four strided blocks, and how much the logits are scaled."""
    params, channels = {"temperature": jnp.array(6.0)}, 1
    for block, key in enumerate(jax.random.split(rng, BLOCKS)):
        params[f"kernel{block}"] = jnp.sqrt(2 / (9 * channels)) * jax.random.normal(
            key, (9 * channels, width)
        )
        params[f"scale{block}"] = jnp.ones(width)
        params[f"bias{block}"] = jnp.zeros(width)
        channels = width
    return params


def head(width: int, ways: int) -> Params:
    """A linear layer on 2 x 2 positions; the classes of a task have no order, so it starts at 0.

    References:
        H. Ye, W. Chao. How to train your MAML to excel in few-shot classification. ICLR 2022 (that
        MAML gains from a head that does not depend on how the classes are numbered).
    """
    return {"head": jnp.zeros((4 * width, ways)), "head_bias": jnp.zeros(ways)}


def features(params: Params, images: jax.Array) -> jax.Array:
    """What the last layer is handed, [batch, 4 width], of images [batch, 17 to 32, 17 to 32]."""
    hidden = images[..., None]
    for block in range(BLOCKS):
        scale, bias = (params[f"{name}{block}"][None, None, None] for name in ("scale", "bias"))
        hidden = _normalised(_patches(hidden) @ params[f"kernel{block}"])
        hidden = jax.nn.relu(hidden * scale + bias)
    return hidden.reshape(len(images), -1)


def apply(params: Params, images: jax.Array) -> jax.Array:
    """Logits [batch, ways]."""
    hidden = features(params, images)
    hidden = hidden - hidden.mean(-1, keepdims=True)
    # Of length 1, so that the curvature in the last layer is known: temperature² / 4 at most.
    hidden = hidden / jnp.sqrt(jnp.sum(hidden**2, -1, keepdims=True) + 1e-6)
    return params["temperature"] * (hidden @ params["head"] + params["head_bias"][None])


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
    """Each channel by its mean and spread over images and positions."""
    axes = (0, 1, 2)
    centred = hidden - hidden.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)
