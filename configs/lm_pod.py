"""A decoder and a weight for each domain of its text, learned for a target: from a CPU to a pod.

    bilevel-flax train --config configs/lm_pod.py:tiny --workdir runs/lm      here, now
    bilevel-flax plan --config configs/lm_pod.py --topology v5e:16x16         before a pod is rented
    bilevel-flax train --config configs/lm_pod.py --workdir DIR               docs/multi_host.md
    bilevel-flax train --config configs/lm_pod.py:small,curriculum --workdir runs/mix

`:tiny` 0.14, `:small` 9.8, `:1b` (the default) 1,059, `:7b` 6,745 million parameters
(`model.SIZES`); `bf.auto` with AdamW on z, 4 gradient units a step. `SIZE,curriculum` learns the
mixture of configs/lm_data_mixing.py, from a sample of the target and with its keys and comparisons,
which train on one device: tiny and small only. Otherwise text is given by
`--config.data.files="('a.txt','b.txt.gz')"`, a domain each, and `--config.data.target=b`; else it
is that of BILEVEL_FLAX_DATA, or the package's own source.

Hardware and runtime, by plan (benchmarks/results): 1B fits v5e:16x16 (4.5 of 15.75 GiB a chip),
7B v5p:8x8x8 (8.5 of 95.7 GiB a chip, at least 1 s a step of a million tokens and as many of the
target); neither has been run. `:tiny` takes some two CPU minutes. Expected there: nats per token
on held-out text of the target (Shakespeare) fall from log 256 = 5.5 to about 2.5, and the share of
the target's own domain rises from the 0.27 that it has of the text.
"""

import ml_collections
from ml_collections import config_dict

from bilevel_flax.train.config import ConfigError, check_choice
from examples.lm_data_mixing import settings

# Per size: the run, and how it computes.
SIZES = {
    "tiny": {"length": 64, "batch_size": 16, "steps": 200, "rate": 3e-3, "dtype": "float32"},
    "small": {"length": 512, "batch_size": 8, "steps": 750, "rate": 1e-3, "dtype": "bfloat16"},
    "1b": {"length": 2048, "batch_size": 256, "steps": 20_000, "rate": 3e-4, "dtype": "bfloat16"},
    "7b": {"length": 2048, "batch_size": 512, "steps": 50_000, "rate": 3e-4, "dtype": "bfloat16"},
}
MESHES = {"1b": "data=16,fsdp=16", "7b": "data=8,fsdp=64"}


def get_config(size: str = "1b") -> ml_collections.ConfigDict:
    """The config; the argument names the size, and may ask for a curriculum."""
    key = f"--config=configs/lm_pod.py:{size}"
    size, _, mixture = size.partition(",")
    check_choice(key, size, SIZES)
    check_choice(key, mixture or "domains", ("domains", "curriculum"))
    if mixture == "curriculum" and size in MESHES:
        raise ConfigError(
            f"{key}: what a curriculum is compared with trains on one device, and {size} does not "
            "fit there: choose tiny or small, or leave curriculum out"
        )
    chosen = SIZES[size]
    config = ml_collections.ConfigDict()
    config.name = "lm_pod"
    config.size = size
    # One reduction a step needs z and v whole on every chip; large ones are gathered by layers.
    if size in MESHES:
        config.mesh, config.reduction = MESHES[size], "gspmd"
    config.dtype = chosen["dtype"]
    config.remat = size in MESHES
    config.length = chosen["length"]
    config.batch_size = chosen["batch_size"]
    config.steps = chosen["steps"]
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint = {"every": 500}
    config.health = {"summary": False}
    if mixture == "curriculum":
        settings.add(config)
    else:
        config.data = {
            "windows_measured": 256,
            "most_windows": 1600 if size == "tiny" else config_dict.placeholder(int),
            "files": config_dict.placeholder(tuple),
            "target": config_dict.placeholder(str),
            "outer_share": 0.1,
        }
        config.task = {"call": "examples.language_model.task:make_task"}
        config.report = "examples.language_model.task:sections"
    steps = config.get_oneway_ref("steps")
    config.solver = {
        "call": "bilevel_flax:auto",
        "steps": steps,
        **(settings.SCHEDULE if mixture == "curriculum" else {}),
        "inner": {
            "call": "examples.language_model.task:adamw",
            "learning_rate": chosen["rate"],
            "steps": steps,
        },
    }
    return config
