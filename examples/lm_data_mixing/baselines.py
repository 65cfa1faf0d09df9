"""What the learned mixture is compared with: the same model, start, steps and tokens.

* uniform: as much of every domain.
* direct_mix: a set share of every minibatch is the target's sample, the rest uniform.
* classifier: of the candidates of a step those that look most like the sample.
* dds: the mixture by the alignment of gradients (`alignment.py`).
* retrained: from scratch on the learned mixture, frozen.
* reference: on the curriculum that the learned one starts from, nothing learned (`reference.py`).
* proportional, direct_mix_tuned, doremi, online, regmix: `rivals.py`.

All read the same stream of candidates. Then each network is fine-tuned on the sample, stopped
where the validation text says; the plain ones share one compiled chunk of steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.data import draws
from bilevel_flax.oracles import FORWARD_UNITS
from bilevel_flax.solvers.auto import decay_to_zero
from bilevel_flax.train.config import resolve
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.workdir import read_json, write_json
from examples.language_model.model import Decoder
from examples.language_model.task import adam_directions, nats_of, warmup_cosine
from examples.lm_data_mixing import classifier, rivals
from examples.lm_data_mixing.alignment import gradient_alignment

_CHUNK = 25  # steps in a compiled chunk of plain training
_COMB, _SAMPLE = 21, 22  # draws of the plain selections

HEADLINE = ("soba", "uniform", "direct_mix", "direct_mix_tuned", "classifier", "regmix")
METHODS = ("soba", "reference", "uniform", "direct_mix", "classifier", "dds", *rivals.NAMES)


class PlainMixture(NamedTuple):
    """A logit for each domain.

    Attributes:
        problem: its losses.
        outer_params: x, equal shares.
        shares: of a state.
    """

    problem: bf.Problem
    outer_params: Any
    shares: Callable[[bf.TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a comparison needs of its run.

    Attributes:
        config: the run's.
        init: where it started.
        plain: a mixture of the same domains, for others to learn.
        units: gradient units of a step of the run's own solver, on average.
        model: the decoder.
        inner: the candidates.
        outer: F's minibatches.
        sample: F's windows, [n, length + 1].
        validation: held-out windows that may choose.
        test: held-out windows that are only reported.
        nats: `nats(z, windows) -> float`.
        weights: `weights(x, steps, candidates) -> [steps, candidates]`, of some steps' candidates.
        looked_at: of each domain some windows.
        sizes: of each domain, in windows.
        pool: [domains], 0 for the target's sample where that is one of them, else 1.
        proposed: [domains], the share of each among the candidates.
        workdir: where results go as they come.
        say: prints a line.
    """

    config: Any
    init: Callable[[jax.Array], Any]
    plain: PlainMixture
    units: float
    model: Decoder
    inner: data.FiniteSum
    outer: data.FiniteSum
    sample: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    nats: Callable[[Any, np.ndarray], float]
    weights: Callable[[Any, np.ndarray, dict[str, np.ndarray]], np.ndarray]
    looked_at: list[np.ndarray]
    sizes: np.ndarray
    pool: np.ndarray
    proposed: np.ndarray
    workdir: Path
    say: Callable[[str], None]

    def start(self) -> Any:
        """Z and x as the run's own loop began."""
        return self.init(jax.random.split(jax.random.PRNGKey(self.config.seed))[0])


class Plain(NamedTuple):
    """A plain run.

    Attributes:
        params: z at the end, or where the validation text was read best.
        curve: (step, validation nats per byte) pairs.
    """

    params: Any
    curve: list[tuple[int, float]]


class Trainer:
    """Plain AdamW on windows that someone else has chosen; compiled once.

    Attributes:
        params: z of the run that is under way, for who chooses windows by it.
    """

    def __init__(self, run: Run):
        self._run = run
        self._directions = adam_directions()
        self.params: Any = None

        @jax.jit
        def chunk(z, state, tokens, rates):
            def step(carry, this):
                z, state = carry
                windows, rate = this
                grad = jax.grad(lambda z: jnp.mean(nats_of(run.model, z, windows)))(z)
                updates, state = self._directions.update(grad, state, z)
                moved = jax.tree.map(lambda leaf, update: leaf - rate * update, z, updates)
                return (moved, state), None

            return jax.lax.scan(step, (z, state), (tokens, rates))[0]

        self._chunk = chunk

    def __call__(self, z, windows, schedule, steps, every, keep_best=False) -> Plain:
        """Trains.

        Args:
            z: the start.
            windows: `windows(start, stop) -> [stop - start, batch, length + 1]`.
            schedule: `schedule(step) -> rate`.
            steps: how many.
            every: steps between two looks at the validation text, rounded up to whole chunks.
            keep_best: return the best of these networks, the start among them.
        """
        run, state = self._run, self._directions.init(z)
        every = -(-every // _CHUNK) * _CHUNK
        curve = [(0, run.nats(z, run.validation))]
        best = z
        for start in range(0, steps, _CHUNK):
            stop = min(steps, start + _CHUNK)
            self.params = z
            tokens = windows(start, stop)
            rates = np.array([float(schedule(step)) for step in range(start, stop)], np.float32)
            short = _CHUNK - len(rates)  # at rate 0 nothing moves
            tokens = np.concatenate([tokens, np.repeat(tokens[-1:], short, axis=0)])
            z, state = self._chunk(z, state, tokens, np.pad(rates, (0, short)))
            if stop % every == 0 or stop == steps:
                curve.append((stop, run.nats(z, run.validation)))
                if curve[-1][1] <= min(value for _, value in curve):
                    best = z
        return Plain(best if keep_best else z, curve)


def compare(run: Run, state: bf.TrainState, names: list[str]) -> dict[str, Any]:
    """Trains what there is to compare with; results that are in the workdir stand.

    Args:
        run: the run.
        state: its last one.
        names: of the domains.

    Returns:
        `nats_per_byte`, `validation_nats_per_byte` (method -> before and after fine-tuning, on
        the test and on the validation text), `retrained_nats_per_byte` (the same of `retrained`),
        `plain_step_equivalents` (method -> what its training cost, searches included, in steps of
        plain training), `rival_mixtures`, `dds_mixture` and `tokens`.
    """
    config = run.config
    path = run.workdir / "baselines.json"
    done: dict[str, Any] = read_json(path) if path.exists() else {}
    trainer = Trainer(run)
    sampler = data.Sampler(run.inner.num_batches, 2 * config.seed)  # the run's own
    per_step, num_sources = config.batch_size, round(1 / run.proposed.min())

    def candidates(start, stop):
        return data.gather(run.inner, sampler.ids(start, stop))

    def chosen(choose):
        def windows(start, stop):
            if run.config.use == "weighting":  # more candidates than a step of it reads
                steps = np.arange(start * num_sources, stop * num_sources) % run.inner.num_batches
                windows_of_step = data.gather(run.inner, steps)
                windows_of_step = {
                    key: leaf.reshape(stop - start, -1, *leaf.shape[2:])
                    for key, leaf in windows_of_step.items()
                }
            else:
                windows_of_step = candidates(start, stop)
            rows = choose(np.arange(start, stop), windows_of_step)
            return np.take_along_axis(windows_of_step["tokens"], rows[..., None], axis=1)

        return windows

    def by_weights(weights_of):
        def choose(steps, windows_of_step):
            weights = zip(weights_of(steps, windows_of_step), steps.tolist(), strict=True)
            return np.stack([_comb(w, per_step, config.seed, step) for w, step in weights])

        return chosen(choose)

    def by_shares(shares):
        def windows(start, stop):
            now = np.asarray(shares()) / run.proposed
            return by_weights(lambda _, candidates: now[candidates["domain"]])(start, stop)

        return windows

    def uniform():
        return by_shares(lambda: run.pool)

    @functools.cache
    def direct(share):
        few = max(1, round(share * per_step))
        rest = uniform()

        def windows(start, stop):
            tokens = rest(start, stop)
            positions = np.arange(start * few, stop * few)
            tokens[:, :few] = _passes(run.sample, positions, config.seed).reshape(
                stop - start, few, -1
            )
            return tokens

        return windows

    def by_classifier():
        unselected = candidates(0, max(1, 4 * len(run.sample) // run.inner.batch_size))
        of_pool = run.pool[unselected["domain"]] > 0
        weights = classifier.fit(run.sample, unselected["tokens"][of_pool])

        def choose(steps, windows_of_step):
            del steps
            scores = classifier.score(weights, windows_of_step["tokens"])
            scores = np.where(run.pool[windows_of_step["domain"]] > 0, scores, -np.inf)
            return np.argsort(-scores, axis=1, kind="stable")[:, :per_step]

        return chosen(choose)

    trained: dict[Any, Plain] = {}  # `direct_mix` is one of those that are tuned

    def plain(windows, steps=config.steps):
        if windows in trained:
            return trained[windows]
        solver = config.solver.inner
        schedule = warmup_cosine(solver.learning_rate, steps)
        result = trainer(run.start().inner_params, windows, schedule, steps, config.eval_every)
        if windows is direct(config.direct_share):
            trained[windows] = result
        return result

    kit = rivals.Kit(
        steps=config.steps,
        seed=config.seed,
        train=plain,
        params=lambda: trainer.params,
        by_shares=by_shares,
        direct=direct,
        nats=run.nats,
        validation=run.validation,
        looked_at=run.looked_at,
        sizes=run.sizes,
        pool=run.pool,
        options=config.rivals,
    )

    def rival(name):
        result = rivals.RIVALS[name](kit)
        costs[name] = result.cost
        notes[name] = result.notes
        if result.mixture is not None:
            mixtures[name] = dict(zip(names, result.mixture.tolist(), strict=True))
        return result.plain

    def aligned():
        solver = gradient_alignment(
            run.plain.problem,
            inner=resolve(config.solver.inner),
            outer=bf.outer.robust_sgd(decay_to_zero(0.01, config.steps)),
        )
        return _learned(run, solver)

    def learned(x):
        return by_weights(functools.partial(run.weights, x))

    jobs = {  # those that say most come first
        "soba": lambda: Plain(state.inner_params, []),
        "direct_mix": lambda: plain(direct(config.direct_share)),
        "direct_mix_tuned": lambda: rival("direct_mix_tuned"),
        "classifier": lambda: plain(by_classifier()),
        "reference": lambda: plain(learned(run.start().outer_params)),
        "retrained": lambda: plain(learned(state.outer_params)),
        "uniform": lambda: plain(uniform()),
        "dds": aligned,
    }
    jobs |= {name: functools.partial(rival, name) for name in rivals.NAMES if name not in jobs}
    units = run.units
    costs: dict[str, float] = {
        **dict.fromkeys(("uniform", "direct_mix", "classifier", "reference"), config.steps),
        "soba": units * config.steps,
        "dds": (1 + FORWARD_UNITS) * config.steps,
        "retrained": (units + 1) * config.steps,
    }
    mixtures: dict[str, dict[str, float]] = {}
    notes: dict[str, Any] = {}
    for number, (name, job) in enumerate(jobs.items()):
        if name in done or (number and not config.baselines):
            continue
        if number:
            run.say(f"comparison {number}/{len(jobs) - 1}: {name}")
        result = job()
        tuned = trainer(
            result.params,
            lambda start, stop: _passes(
                run.sample, np.arange(start * per_step, stop * per_step), config.seed
            ).reshape(stop - start, per_step, -1),
            optax.cosine_decay_schedule(config.finetune.learning_rate, config.finetune.steps),
            config.finetune.steps,
            _CHUNK,
            keep_best=True,
        )
        done[name] = {
            "before": run.nats(result.params, run.test),
            "after": run.nats(tuned.params, run.test),
            "validation_before": tuned.curve[0][1],
            "validation_after": min(value for _, value in tuned.curve),
            "curve": result.curve,
            "finetune_curve": tuned.curve,
        }
        done[name]["plain_step_equivalents"] = costs[name]
        if notes.get(name):
            done[name]["notes"] = notes[name]
        if name in mixtures:
            done[name]["mixture"] = mixtures[name]
        if name == "dds":
            done[name]["mixture"] = result.mixture
        write_json(path, done)
    return _summary(done, config)


def _summary(done: dict[str, Any], config: Any) -> dict[str, Any]:
    def pairs(prefix, name):
        return {when: done[name][f"{prefix}{when}"] for when in ("before", "after")}

    methods = [name for name in METHODS if name in done]
    results = {
        "nats_per_byte": {name: pairs("", name) for name in methods},
        "validation_nats_per_byte": {name: pairs("validation_", name) for name in methods},
        "plain_step_equivalents": {
            name: done[name][key]
            for name in methods
            for key in ("plain_step_equivalents",)
            if key in done[name]  # not in a comparison that began before it was counted
        },
        "tokens": config.steps * config.batch_size * config.length,
    }
    if "retrained" in done:
        results["retrained_nats_per_byte"] = pairs("", "retrained")
        results["dds_mixture"] = done["dds"]["mixture"]
        results["rival_mixtures"] = {
            name: done[name]["mixture"] for name in rivals.NAMES if "mixture" in done[name]
        }
    return results


class _Aligned(NamedTuple):
    params: Any
    curve: list[tuple[int, float]]
    mixture: dict[str, float]


def _learned(run: Run, solver: bf.BilevelSolver) -> _Aligned:
    """A bilevel run beside the run's own, on the same minibatches."""
    config = run.config
    start, run_rng = run.start(), jax.random.split(jax.random.PRNGKey(config.seed))[1]
    state = solver.init(
        start.inner_params, run.plain.outer_params, model_state=start.model_state, rng=run_rng
    )
    loop = StepRunner(solver, run.inner, run.outer, seed=config.seed, on_device=config.on_device)
    curve = [(0, run.nats(state.inner_params, run.validation))]
    step = 0
    while step < config.steps:
        stop = min(config.steps, step + config.eval_every - step % config.eval_every)
        state, info = loop.run(state, step, stop)
        step += len(info.inner_loss)
        if step == stop:
            curve.append((step, run.nats(state.inner_params, run.validation)))
    loop.close()
    return _Aligned(state.inner_params, curve, run.plain.shares(state))


def _comb(weights: np.ndarray, count: int, seed: int, step: int) -> np.ndarray:
    """`outer.select` on the host: positions [count] of candidates, in proportion to `weights`."""
    total = np.cumsum(weights)
    teeth = (draws.uniform(1, seed, _COMB, step)[0] + np.arange(count)) / count * total[-1]
    return np.minimum(np.searchsorted(total, teeth, side="right"), np.argmax(total))


def _passes(sample: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray:
    """The windows at `positions` of an endless series of shuffled passes over the sample."""
    passes, place = np.divmod(positions, len(sample))
    orders = {
        number: draws.permutation(len(sample), seed, _SAMPLE, number)
        for number in np.unique(passes).tolist()
    }
    return sample[[orders[a][b] for a, b in zip(passes.tolist(), place.tolist(), strict=True)]]
