"""Which domains of text a language model should read more of, learned while it trains.

With one logit x_d for each domain, p = softmax(x) and q the domains' shares of the text,

    G(z, x) = mean_i p_d/q_d NLL(z; window_i)        F(z) = mean NLL on text of the target

and the weight of a domain that helps on the target goes up.

References:
    D. Grangier, P. Ablin, A. Hannun. Adaptive training distributions with scalable online bilevel
    optimization. TMLR 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.checks import check_count
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.report.sections import Section, table_section
from bilevel_flax.train.task import InitialValues, Task
from bilevel_flax.train.workdir import read_json
from examples.language_model import text
from examples.language_model.model import RULES, Decoder, make_model

_PART = 16  # windows at once where the loss is only measured


def nats_of(model: Decoder, z: Any, tokens: jax.Array) -> jax.Array:
    """The mean negative log-likelihood of each window [batch, length + 1], float32 [batch]."""
    return jnp.asarray(model.apply({"params": z}, tokens)).mean(-1)


def make_problem(model: Decoder, mixture: bf.outer.DataMixture) -> bf.Problem:
    """The two losses; a mean over windows, so that minibatches can be cut by examples."""
    nats = lambda z, batch: nats_of(model, z, batch["tokens"])

    def inner_loss(z, x, batch):
        return bf.masked_mean(mixture.weights(x, batch) * nats(z, batch), batch.get("mask"))

    def outer_loss(z, x, batch):
        del x
        return bf.masked_mean(nats(z, batch), batch.get("mask"))

    return bf.Problem(inner_loss, outer_loss)


def adam_directions(
    weight_decay: float = 0.1, mu_dtype: str | None = None
) -> optax.GradientTransformation:
    """AdamW, clipped, before it is multiplied by a learning rate."""
    matrices = lambda params: jax.tree.map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95, mu_dtype=mu_dtype),
        optax.add_decayed_weights(weight_decay, matrices),
    )


def warmup_cosine(learning_rate: float, steps: int) -> optax.Schedule:
    """From 0 up to `learning_rate` in a 50th of the run, then along a cosine to a tenth of it."""
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 50), max(2, steps), end_value=0.1 * learning_rate
    )


def adamw(
    learning_rate: float, steps: int, weight_decay: float = 0.1, mu_dtype: str | None = None
) -> optax.GradientTransformation:
    """As decoders are trained: clipped, warmed up over a 50th of the run, then a cosine.

    Args:
        learning_rate: the highest.
        steps: of the run.
        weight_decay: of matrices only.
        mu_dtype: of the first moment; None: the parameters'.
    """
    return optax.chain(
        adam_directions(weight_decay, mu_dtype),
        optax.scale_by_learning_rate(warmup_cosine(learning_rate, steps)),
    )


def make_task(config: Any) -> Task:
    """The task that `configs/lm_pod.py` describes.

    Args:
        config: keys `size`, `dtype`, `remat`, `length`, `batch_size`, `seed` and `data`.

    Raises:
        ConfigError: an unknown size, or text that is missing or too short.
    """
    model = make_model(config.size, config.dtype, config.remat)
    length, batch_size = config.length, config.batch_size
    for name in ("length", "batch_size"):
        check_count(f"--config.{name}", config[name])
    domains = text.load(config.data.files)
    largest = max(int(tokens.max()) for tokens in domains.values())
    if largest >= model.size.vocabulary:
        raise ConfigError(
            f"--config.data.files: token {largest} is outside the vocabulary of "
            f"{model.size.vocabulary} of --config.size={config.size}"
        )
    parts = text.split(domains, config.data.target, config.data.outer_share)
    mixture = text.mixture(parts.mixture, length, batch_size)
    target = text.windows(parts.outer, length, batch_size, "the target (for the outer loss)")
    if config.data.most_windows is not None:  # the adjoint's residual at the end reads all of them
        most = max(config.data.most_windows, batch_size)
        mixture = text.Windows(*(part[:: -(-len(part) // most)] for part in mixture))
        target = target[:: -(-len(target) // most)]
    measured = text.windows(parts.held_out, length, 1, "the target (held out)")
    measured = measured[:: -(-len(measured) // config.data.windows_measured)]
    counts = np.bincount(mixture.domain, minlength=len(domains))
    # A domain of which no window was kept is not read; every logit starts at 0, the text as it is.
    weights = bf.outer.domain_weights(
        len(domains), proposal=np.maximum(counts, 1).tolist(), reference=counts
    )
    nats = jax.jit(lambda z, tokens: nats_of(model, z, tokens))

    def init(rng: jax.Array) -> InitialValues:
        z = model.init(rng, jnp.zeros((1, length + 1), jnp.int32))["params"]
        return InitialValues(z, weights.init())

    def held_out_nats(state: bf.TrainState) -> float:
        whole = np.resize(measured, (-(-len(measured) // _PART) * _PART, length + 1))
        values = [nats(state.inner_params, part) for part in np.split(whole, len(whole) // _PART)]
        return float(np.concatenate(values)[: len(measured)].mean())

    def learned(state: bf.TrainState) -> dict[str, float]:
        shares = weights.shares(state.outer_params)
        return {name: float(share) for name, share in zip(domains, shares, strict=True)}

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        shares = {f"mixture/{name}": share for name, share in learned(state).items()}
        return {"nats_per_token": held_out_nats(state), **shares}

    def final_metrics(state: bf.TrainState, workdir: Path, log) -> dict[str, Any]:
        del workdir, log
        return {"nats_per_token": held_out_nats(state), "mixture": learned(state)}

    return Task(
        problem=make_problem(model, weights),
        init=init,
        inner=data.partition(mixture._asdict(), batch_size, seed=config.seed),
        outer=data.partition({"tokens": target}, batch_size, seed=config.seed),
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=("nats_per_token",),
        units={"nats_per_token": "nats", "mixture": "fraction"},
        rules=RULES,
        domains=list(domains),
    )


def sections(workdir: Path) -> list[Section]:
    """The report's own part: the learned mixture."""
    path = workdir / "summary.json"
    mixture = read_json(path).get("mixture", {}) if path.exists() else {}
    if not mixture:
        return []
    rows = sorted(mixture.items(), key=lambda item: -item[1])
    return [table_section("Learned mixture", ("domain", "weight"), rows)]
