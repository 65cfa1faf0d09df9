"""Which text a language model should read for a target of which there is little.

With one logit x_d for each domain and p = softmax(x / τ), or a small network that weighs windows,

    G(z, x) = Σ_d p_d E_{window ~ D_d} NLL(z; window)      F(z) = mean NLL on a sample of the target

and the share of text that helps on the target goes up, while the model trains on it.

References:
    D. Grangier, P. Ablin, A. Hannun. Adaptive training distributions with scalable online bilevel
    optimization. TMLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.checks import check_count
from bilevel_flax.train.config import ConfigError, nearest
from bilevel_flax.train.task import InitialValues, Task
from examples.language_model import text
from examples.language_model.model import RULES, Decoder, make_model
from examples.language_model.task import nats_of
from examples.lm_data_mixing import baselines, report, stream

SAMPLE = "sample"  # the name of the domain that is half of the target's sample
_PART = 64  # windows at once where the loss is only measured
_PROPOSED = 32  # windows of each domain on which a network's shares are measured


class Texts(NamedTuple):
    """The text of a run, in windows."""

    domains: dict[str, stream.Windows]
    target: stream.Target
    name: str  # of the target
    sample: stream.Windows  # of the target: F's, and with `sample_in_mixture` that of G as well


def load_texts(config: Any) -> Texts:
    """Reads the domains and the target, and sets parts of the target aside.

    Raises:
        ConfigError: a file that is missing, empty or too short, an unknown target, one domain.
    """
    files = {**(text.found_files() if config.default_domains else {}), **config.domains}
    tokens = text.load(files) if files or not config.default_domains else text.own_text()
    domains = {
        name: stream.windows(text_tokens, config.length, f"--config.domains.{name}")
        for name, text_tokens in tokens.items()
    }
    if not domains:
        raise ConfigError("--config.domains: there are none: add some, --config.domains.NAME=path")
    chosen = config.target
    if chosen is None:
        chosen = "shakespeare" if "shakespeare" in domains else next(iter(domains))
    key, name = f"--config.target={chosen}", chosen
    if chosen in domains:
        whole = domains[chosen]
    elif Path(chosen).expanduser().is_file():
        path = Path(chosen).expanduser()
        name = path.name.partition(".")[0]
        whole = stream.windows(text.read(path, "--config.target"), config.length, key)
    else:
        raise ConfigError(
            f"{key}: neither a file nor a domain ({', '.join(domains)})"
            f"{nearest(chosen, list(domains))}"
        )
    shares = {part: config.data[f"{part}_share"] for part in ("outer", "validation", "test")}
    target = stream.split(whole, shares, config.batch_size, config.seed, key)
    if chosen in domains:
        domains[chosen] = target.rest
        if not config.target_in_mixture or not len(target.rest):
            del domains[chosen]
    sample = target.outer
    if config.sample_in_mixture:
        # Cross-fitted: what G reads is not in F, or F would reward what z knows by heart.
        parts = (np.arange(start, len(sample), 2) for start in (0, 1))
        of_outer, of_inner = (sample.part(part) for part in parts)
        if len(of_outer) < config.batch_size:
            raise ConfigError(
                f"--config.sample_in_mixture=true: the sample has {len(sample)} windows, of which "
                f"F keeps {len(of_outer)}, fewer than one batch of {config.batch_size}: give it "
                "more (--config.data.outer_share), or leave sample_in_mixture out"
            )
        domains[SAMPLE] = of_inner
        target = target._replace(outer=of_outer)
    if len(domains) < 2:
        raise ConfigError(
            f"--config.domains: {len(domains)} domain to train on, and a mixture needs two: add "
            "one with --config.domains.NAME=path"
        )
    return Texts(domains, target, name, sample)


def make_mixture(name: str, num_domains: int, temperature: float) -> bf.outer.DataMixture:
    """The outer parameters by name: a logit for each domain, or a network on a window's bytes.

    Raises:
        ConfigError: another name, or a temperature that is not positive.
    """
    if name == "domains":
        if not temperature > 0:
            raise ConfigError(f"--config.temperature={temperature}: must be above 0")
        return bf.outer.domain_weights(num_domains, temperature=temperature)
    if name == "network":
        return bf.outer.network_weights(byte_features, 256, num_domains)
    raise ConfigError(
        f"--config.mixture={name}: choose domains or network{nearest(name, ['domains', 'network'])}"
    )


def byte_features(batch: Any) -> jax.Array:
    """How often each byte is in a window, as square roots: [batch, 256], each of length √256."""
    tokens = batch["tokens"].astype(jnp.int32) % 256
    rows = jnp.arange(len(tokens))[:, None]
    counts = jnp.zeros((len(tokens), 256)).at[rows, tokens].add(1.0)
    return 16 * jnp.sqrt(counts / tokens.shape[1])


def make_problem(
    model: Decoder, mixture: bf.outer.DataMixture, use: str, oversampling: int
) -> bf.Problem:
    """The two losses.

    Args:
        model: the decoder.
        mixture: the weights.
        use: "sampling": of the candidates of a minibatch one in `oversampling` is read, drawn by
            the weights; "weighting": all are, and their losses are weighted.
        oversampling: candidates for each window that is read.
    """

    def nats(z, tokens):
        return nats_of(model, z, tokens)

    def outer_loss(z, x, batch, model_state=None, rng=None):
        del x, model_state, rng
        return bf.masked_mean(nats(z, batch["tokens"]), batch.get("mask"))

    if use == "weighting":
        return bf.Problem(
            lambda z, x, batch: jnp.mean(mixture.weights(x, batch) * nats(z, batch["tokens"])),
            outer_loss,
        )

    def inner_loss(z, x, batch, model_state, rng):
        key = jax.random.PRNGKey(0) if rng is None else rng
        count = len(batch["domain"]) // oversampling
        chosen = bf.outer.select(key, mixture.weights(x, batch), count)
        loss = jnp.mean(chosen.ratio * nats(z, batch["tokens"][chosen.index]))
        return loss, bf.Aux(model_state=model_state)

    return bf.Problem(inner_loss, lambda *args: (outer_loss(*args), bf.Aux()), stateful=True)


def make_task(config: Any) -> Task:
    """The task that `configs/lm_data_mixing.py` describes.

    Args:
        config: keys `domains`, `default_domains`, `target`, `target_in_mixture`,
            `sample_in_mixture`, `size`, `dtype`,
            `remat`, `length`, `batch_size`, `oversampling`, `mixture`, `temperature`, `use`,
            `seed`, `data`, `baselines`, `rivals`, `finetune`.

    Raises:
        ConfigError: an unknown size, mixture or use, or text that is missing or too short.
    """
    model = make_model(config.size, config.dtype, config.remat)
    for name in ("length", "batch_size"):
        check_count(f"--config.{name}", config[name])
    if config.use not in ("sampling", "weighting"):
        raise ConfigError(f"--config.use={config.use}: choose sampling or weighting")
    texts = load_texts(config)
    names = list(texts.domains)
    oversampling = len(names) if config.oversampling is None else config.oversampling
    check_count("--config.oversampling", oversampling)
    mixture = make_mixture(config.mixture, len(names), config.temperature)
    count = config.batch_size * (oversampling if config.use == "sampling" else 1)
    inner = stream.candidates(texts.domains, count, config.seed)
    sample, of_outer = texts.sample.all(), texts.target.outer.all()
    problem = make_problem(model, mixture, config.use, int(oversampling))
    nats = measure(model)
    validation = thin(texts.target.validation.all(), config.data.windows_measured)
    several = {
        name: thin(windows.part(np.arange(0, len(windows), max(1, len(windows) // 999))).all(), 32)
        for name, windows in texts.domains.items()
    }
    proposed = {
        "tokens": np.concatenate([np.resize(w, (_PROPOSED, w.shape[1])) for w in several.values()]),
        "domain": np.repeat(np.arange(len(names)), _PROPOSED),
    }
    shares_of = jax.jit(lambda x: mixture.shares(x, proposed))

    several_weights = jax.jit(jax.vmap(mixture.weights, (None, 0)))

    def weights_of(x: Any, candidates: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(several_weights(x, candidates), np.float64)

    def init(rng: jax.Array) -> InitialValues:
        z = model.init(rng, jnp.zeros((1, config.length + 1), jnp.int32))["params"]
        return InitialValues(z, mixture.init(), {} if problem.stateful else None)

    def learned(state: bf.TrainState) -> dict[str, float]:
        return dict(zip(names, np.asarray(shares_of(state.outer_params)).tolist(), strict=True))

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        shares = {f"mixture/{name}": share for name, share in learned(state).items()}
        return {"validation_nats_per_byte": nats(state.inner_params, validation), **shares}

    def final_metrics(
        state: bf.TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        run = baselines.Run(
            config=config,
            init=init,
            problem=problem,
            model=model,
            inner=inner,
            outer=outer,
            sample=sample,
            validation=validation,
            test=texts.target.test.all(),
            nats=nats,
            shares=learned,
            weights=weights_of,
            looked_at=list(several.values()),
            sizes=np.array([len(windows) for windows in texts.domains.values()]),
            pool=np.array([float(name != SAMPLE) for name in names]),
            workdir=workdir,
            say=log,
        )
        results = baselines.compare(run, state, names)
        if config.baselines:
            results["conclusion"] = report.conclusion(results)
        return {"target": texts.name, "mixture": learned(state), **results}

    outer = data.partition({"tokens": of_outer}, config.batch_size, seed=config.seed)
    return Task(
        problem=problem,
        init=init,
        inner=inner,
        outer=outer,
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=[
            f"nats_per_byte.{name}.{when}"
            for name in (baselines.HEADLINE if config.baselines else ("soba",))
            for when in ("after", "before")  # the fine-tuned network is the one to hand over
        ],
        units={
            "validation_nats_per_byte": "nats",
            "nats_per_byte": "nats",
            "retrained_nats_per_byte": "nats",
            "mixture": "fraction",
            "dds_mixture": "fraction",
            "rival_mixtures": "fraction",
        },
        rules=RULES,
    )


def thin(windows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of them, evenly spaced."""
    return windows[:: -(-len(windows) // most)]


def measure(model: Decoder) -> Callable[[Any, np.ndarray], float]:
    """`nats(z, windows [n, length + 1]) -> float`, the mean of all bytes; compiled once."""

    @jax.jit
    def sums(z, tokens, real):
        return jnp.sum(jnp.where(real, nats_of(model, z, tokens), 0.0))

    def nats(z, windows):
        total = 0.0
        for start in range(0, len(windows), _PART):
            part = windows[start : start + _PART]
            real = np.arange(_PART) < len(part)
            total += float(sums(z, np.resize(part, (_PART, windows.shape[1])), real))
        return total / len(windows)

    return nats
