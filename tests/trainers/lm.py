"""A tiny language model's data: two domains of tokens, of which one is the target's."""

import numpy as np

import bilevel_flax as bf

VOCABULARY, LENGTH, BATCH, STEPS = 11, 6, 8, 50
MIXTURE = bf.outer.domain_weights(2)


def minibatches(seed: int, target: bool = False):
    """Domain 0 counts upwards, domain 1 downwards; the target counts upwards."""
    rng = np.random.default_rng(seed)
    while True:
        domain = np.zeros(BATCH, np.int32) if target else (np.arange(BATCH) % 2).astype(np.int32)
        start = rng.integers(0, VOCABULARY, (BATCH, 1))
        sign = np.where(domain == 0, 1, -1)[:, None]
        tokens = (start + sign * np.arange(LENGTH)) % VOCABULARY
        yield {"tokens": tokens.astype(np.int32), "domain": domain}


def streams():
    return minibatches(0), minibatches(1, target=True)
