"""Names that have left a module: old place, `module:name` of the new one."""

_CONTRIB = (
    *("bsa", "bsg", "bsgo", "darts1", "darts2", "fsla", "masoba", "mrbo", "spaba", "sustain"),
    *("ttsa", "vrbo"),
)
ATTRIBUTES = {
    **{
        f"{place}.{name}": f"bilevel_flax.contrib:{name}"
        for place in ("bilevel_flax", "bilevel_flax.solvers")
        for name in _CONTRIB
    },
    "bilevel_flax.data.ImageData": "examples.datasets.sources:ImageData",
    "bilevel_flax.data.load": "examples.datasets.sources:load",
    "bilevel_flax.grid_search": "bilevel_flax.bench.searches:grid_search",
    "bilevel_flax.outer.architecture.entropy": "examples.darts.selection:entropy",
    "bilevel_flax.outer.architecture.select_by_perturbation": (
        "examples.darts.selection:select_by_perturbation"
    ),
    "bilevel_flax.outer.architecture.stop_before_rise": "examples.darts.selection:stop_before_rise",
    "bilevel_flax.outer.architecture.strongest": "examples.darts.selection:strongest",
    "bilevel_flax.random_search": "bilevel_flax.bench.searches:random_search",
    "bilevel_flax.train.device_feed.Feed": "bilevel_flax.train.device_feed:DeviceFeed",
    "bilevel_flax.train.experiment.HARMLESS": "bilevel_flax.train.run_config:RESUME_SAFE",
    "bilevel_flax.train.experiment.Trained": "bilevel_flax.train.train_loop:Trained",
    "bilevel_flax.train.experiment.make_solver": "bilevel_flax.train.setup:make_solver",
    "bilevel_flax.train.experiment.train": "bilevel_flax.train.train_loop:train_loop",
    "bilevel_flax.train.metrics.accumulator.Window": (
        "bilevel_flax.train.metrics.accumulator:MetricAccumulator"
    ),
    "bilevel_flax.train.multihost.PeerFailed": "bilevel_flax.train.multihost:PeerError",
    "bilevel_flax.train.preemption.SignalGuard": "bilevel_flax.train.preemption:PreemptionGuard",
    "bilevel_flax.train.report.plots.readable": "bilevel_flax.train.report.plots:humanize",
    "bilevel_flax.train.step_runner.Loop": "bilevel_flax.train.step_runner:StepRunner",
    "bilevel_flax.train.task.Start": "bilevel_flax.train.task:InitialValues",
    "bilevel_flax.train.train_loop.train": "bilevel_flax.train.train_loop:train_loop",
    "bilevel_flax.train.workdir.NoRoom": "bilevel_flax.train.workdir:DiskFullError",
    "bilevel_flax.train.workdir.claim": "bilevel_flax.train.workdir:check_same_run",
    "bilevel_flax.train.workdir.opened": "bilevel_flax.train.workdir:lock",
}
