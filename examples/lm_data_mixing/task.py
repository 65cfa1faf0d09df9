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
from bilevel_flax.train.config import ConfigError, nearest, resolve
from bilevel_flax.train.task import InitialValues, Task
from examples.language_model import text
from examples.language_model.model import RULES, Decoder, make_model
from examples.language_model.task import nats_of
from examples.lm_data_mixing import baselines, curriculum, reference, report, stream

SAMPLE = "sample"  # the name of the domain that is the target's sample
_PART = 4096  # tokens at once where the loss is only measured
_FITTED = 2000  # windows of a domain of which the reference reads the bytes
_PROPOSED = 32  # windows of each domain on which a network's shares are measured


class Texts(NamedTuple):
    """The text of a run, in windows."""

    domains: dict[str, stream.Windows]
    target: stream.Target
    name: str  # of the target


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
    if len(domains) < 2:
        raise ConfigError(
            f"--config.domains: {len(domains)} domain to train on, and a mixture needs two: add "
            "one with --config.domains.NAME=path"
        )
    return Texts(domains, target, name)


class Sources(NamedTuple):
    """What G and F read, and the weights of it.

    Attributes:
        names: of the domains.
        inner: what the candidates come from, in turn: domains, or parts of one.
        domain: int [sources], the number of each one's domain.
        outer: F's windows.
        mixture: the weights that are learned.
        plain: weights of the same domains, equal shares to begin with, for others to learn.
    """

    names: list[str]
    inner: list[stream.Windows]
    domain: np.ndarray
    outer: stream.Windows
    mixture: bf.outer.DataMixture
    plain: bf.outer.DataMixture


def make_sources(config: Any, texts: Texts) -> Sources:
    """The outer parameters by name, and the text as they need it.

    * domains: a logit for each domain.
    * network: a network on a window's bytes.
    * curriculum: logits of the domains and of the target on top of the reference of
      `reference.py`.

    Raises:
        ConfigError: another name, or a temperature that is not positive.
    """
    names, inner = list(texts.domains), list(texts.domains.values())
    count, sample = len(names), texts.target.outer
    if config.mixture in ("domains", "curriculum") and not config.temperature > 0:
        raise ConfigError(f"--config.temperature={config.temperature}: must be above 0")
    if config.mixture == "network":
        network = bf.outer.network_weights(byte_features, 256, count)
        return Sources(names, inner, np.arange(count), sample, network, network)
    if config.mixture == "domains":
        weights = bf.outer.domain_weights(count, temperature=config.temperature)
        return Sources(names, inner, np.arange(count), sample, weights, weights)
    if config.mixture != "curriculum":
        known = ["curriculum", "domains", "network"]
        raise ConfigError(
            f"--config.mixture={config.mixture}: choose curriculum, domains or network"
            f"{nearest(config.mixture, known)}"
        )
    if len(sample) < 2:
        raise ConfigError(
            f"--config.mixture=curriculum: the target's sample has {len(sample)} window, and both "
            "losses need a half of it: give it more (--config.data.outer_share)"
        )
    if SAMPLE in names:
        raise ConfigError(
            f"--config.domains.{SAMPLE}: this is the name of the target's own sample: choose "
            "another"
        )
    # Cross-fitted: what G has read is not in F, or F would reward what z knows by heart.
    halves = [sample.part(np.arange(start, len(sample), 2)) for start in (0, 1)]
    pool = [spread(windows, _FITTED) for windows in inner]
    passes = config.curriculum.epochs / (config.steps * config.batch_size)
    most = passes * np.array([len(windows) for windows in inner])
    known = reference.fit(pool, [spread(half, _FITTED) for half in halves], most)
    learned = curriculum.curriculum(
        known.shares,
        reference.rise(known, passes * len(sample)),
        ~known.spent if not known.spent.all() else known.spent,  # all: there is nothing better
        curriculum.scores(known.ratio, np.concatenate(pool)),
        rate=1.0 if config.use == "weighting" else 1 / oversampling_of(config, count + 2),
        released=1 - config.solver.get("cooldown", 0.0),
        temperature=config.temperature,
    )
    plain = bf.outer.domain_weights(count + 1, [1] * count + [2], reference=np.ones(count + 1))

    def plain_weights(outer_params, batch):  # F's half stays F's: x is learned to the end
        twice = jnp.where(batch["domain"] == count, 2.0 * (batch["part"] == 0), 1.0)
        return twice * plain.weights(outer_params, batch)

    return Sources(
        [*names, SAMPLE],
        [*inner, halves[0], sample],
        np.array([*range(count), count, count]),
        halves[1],
        learned,
        plain._replace(weights=plain_weights),
    )


def oversampling_of(config: Any, num_sources: int) -> int:
    """Candidates for each window that is read."""
    oversampling = num_sources if config.oversampling is None else config.oversampling
    check_count("--config.oversampling", oversampling)
    return oversampling


def byte_features(batch: Any) -> jax.Array:
    """How often each byte is in a window, as square roots: [batch, 256], each of length √256."""
    tokens = batch["tokens"].astype(jnp.int32) % 256
    rows = jnp.arange(len(tokens))[:, None]
    counts = jnp.zeros((len(tokens), 256)).at[rows, tokens].add(1.0)
    return 16 * jnp.sqrt(counts / tokens.shape[1])


def make_problem(
    model: Decoder, mixture: bf.outer.DataMixture, use: str, oversampling: int, steps: int
) -> bf.Problem:
    """The two losses; stateful, for the mixture may depend on how far the run is.

    Args:
        model: the decoder.
        mixture: the weights.
        use: "sampling": of the candidates of a minibatch one in `oversampling` is read, drawn by
            the weights; "weighting": all are, and their losses are weighted.
        oversampling: candidates for each window that is read.
        steps: of the run.
    """

    def nats(z, tokens):
        return nats_of(model, z, tokens)

    def outer_loss(z, x, batch, model_state, rng):
        del x, model_state, rng
        return bf.masked_mean(nats(z, batch["tokens"]), batch.get("mask")), bf.Aux()

    def inner_loss(z, x, batch, model_state, rng):
        here = {**batch, "progress": progress_at(model_state["step"], steps)}
        after = bf.Aux(model_state={"step": model_state["step"] + 1})
        if use == "weighting":
            losses = nats(z, batch["tokens"])
            return bf.masked_mean(mixture.weights(x, here) * losses, batch.get("mask")), after
        key = jax.random.PRNGKey(0) if rng is None else rng
        count = len(batch["domain"]) // oversampling
        chosen = bf.outer.select(key, mixture.weights(x, here), count)
        return jnp.mean(chosen.ratio * nats(z, batch["tokens"][chosen.index])), after

    return bf.Problem(inner_loss, outer_loss, stateful=True)


def progress_at(step: Any, steps: int) -> Any:
    """How far a run is at a step, in [0, 1)."""
    return step / steps


def make_task(config: Any) -> Task:
    """The task that `configs/lm_data_mixing.py` describes.

    Args:
        config: keys `domains`, `default_domains`, `target`, `target_in_mixture`, `size`, `dtype`,
            `remat`, `length`, `batch_size`, `steps`, `oversampling`, `mixture`, `curriculum`,
            `temperature`, `use`, `seed`, `data`, `baselines`, `rivals`, `finetune`, `solver`.

    Raises:
        ConfigError: an unknown size, mixture or use, or text that is missing or too short.
    """
    model = make_model(config.size, config.dtype, config.remat)
    for name in ("length", "batch_size"):
        check_count(f"--config.{name}", config[name])
    if config.use not in ("sampling", "weighting"):
        raise ConfigError(f"--config.use={config.use}: choose sampling or weighting")
    texts = load_texts(config)
    sources = make_sources(config, texts)
    names, mixture = sources.names, sources.mixture
    oversampling = oversampling_of(config, len(sources.inner))
    count = config.batch_size * (oversampling if config.use == "sampling" else 1)
    inner = stream.candidates(
        {str(i): windows for i, windows in enumerate(sources.inner)},
        count,
        config.seed,
        numbers=sources.domain.tolist(),
    )
    sample, of_outer = texts.target.outer.all(), sources.outer.all()
    problem, plain = (
        make_problem(model, weights, config.use, int(oversampling), config.steps)
        for weights in (mixture, sources.plain)
    )
    nats = measure(model)
    validation = thin(texts.target.validation.all(), config.data.windows_measured)
    several = [spread(w, 32) for w, d in zip(sources.inner, sources.domain, strict=True)]
    looked_at = [
        np.concatenate([w for w, d in zip(several, sources.domain, strict=True) if d == number])
        for number in range(len(names))
    ]
    proposed = {
        "tokens": np.concatenate([np.resize(w, (_PROPOSED, w.shape[1])) for w in looked_at]),
        "domain": np.repeat(np.arange(len(names)), _PROPOSED),
    }

    def shares_by(weights: bf.outer.DataMixture) -> Callable[[bf.TrainState], dict[str, float]]:
        shares_of = jax.jit(lambda x, at: weights.shares(x, {**proposed, "progress": at}))

        def shares(state):
            at = jnp.float32(progress_at(state.step, config.steps))
            values = np.asarray(shares_of(state.outer_params, at))
            return dict(zip(names, values.tolist(), strict=True))

        return shares

    learned = shares_by(mixture)
    several_weights = jax.jit(
        jax.vmap(lambda x, at, batch: mixture.weights(x, {**batch, "progress": at}), (None, 0, 0))
    )

    def weights_of(x: Any, steps: np.ndarray, candidates: dict[str, np.ndarray]) -> np.ndarray:
        at = progress_at(steps.astype(np.float32), config.steps)
        return np.asarray(several_weights(x, at, candidates), np.float64)

    def init(rng: jax.Array) -> InitialValues:
        z = model.init(rng, jnp.zeros((1, config.length + 1), jnp.int32))["params"]
        return InitialValues(z, mixture.init(), {"step": jnp.int32(0)})

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        shares = {f"mixture/{name}": share for name, share in learned(state).items()}
        return {"validation_nats_per_byte": nats(state.inner_params, validation), **shares}

    def final_metrics(
        state: bf.TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        run = baselines.Run(
            config=config,
            init=init,
            plain=baselines.PlainMixture(plain, sources.plain.init(), shares_by(sources.plain)),
            units=resolve(config.solver, problem=problem).units,
            model=model,
            inner=inner,
            outer=outer,
            sample=sample,
            validation=validation,
            test=texts.target.test.all(),
            nats=nats,
            weights=weights_of,
            looked_at=looked_at,
            sizes=np.bincount(sources.domain, [len(windows) for windows in sources.inner]),
            pool=np.array([float(name != SAMPLE) for name in names]),
            proposed=np.bincount(sources.domain) / len(sources.domain),
            workdir=workdir,
            say=log,
        )
        results = baselines.compare(run, state, names)
        if config.baselines:
            results["conclusion"] = report.conclusion(results)
        return {"target": texts.name, "mixture": learned(state), **results}

    # Half of a small sample may be less than a minibatch.
    outer_size = min(config.batch_size, len(of_outer))
    outer = data.partition({"tokens": of_outer}, outer_size, seed=config.seed)
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


def spread(windows: stream.Windows, most: int) -> np.ndarray:
    """At most `most` windows of all of them, evenly spaced; only these are read."""
    return windows.part(np.arange(0, len(windows), -(-len(windows) // most))).all()


def thin(windows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of them, evenly spaced."""
    return windows[:: -(-len(windows) // most)]


def measure(model: Decoder) -> Callable[[Any, np.ndarray], float]:
    """`nats(z, windows [n, length + 1]) -> float`, the mean of all bytes; compiled once."""

    @jax.jit
    def sums(z, tokens, real):
        return jnp.sum(jnp.where(real, nats_of(model, z, tokens), 0.0))

    def nats(z, windows):
        total, length = 0.0, windows.shape[1]
        count = max(1, _PART // (length - 1))
        for start in range(0, len(windows), count):
            part = windows[start : start + count]
            real = np.arange(count) < len(part)
            total += float(sums(z, np.resize(part, (count, length)), real))
        return total / len(windows)

    return nats
