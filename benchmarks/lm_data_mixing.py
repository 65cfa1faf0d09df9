"""Learned data mixtures against the baselines: two targets, three seeds, with and without its text.

    python benchmarks/lm_data_mixing.py --out runs/lm
    python benchmarks/lm_data_mixing.py --out runs/lm --markdown
    python benchmarks/lm_data_mixing.py --out runs/more --targets a.txt,b.txt --inside false

Runs that are there are not repeated, and an interrupted one goes on. Prints, and writes to
`table.md`, means and deviations over the seeds; `--markdown` runs nothing and prints those of
what is there, interrupted runs among it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from bilevel_flax.train.workdir import read_json
from examples.lm_data_mixing.baselines import METHODS

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "lm_data_mixing.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default="shakespeare,python", help="domains, or files")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--inside", default="false,true", help="is the target's text in the pool?")
    parser.add_argument("--markdown", action="store_true", help="the tables of what is there")
    parser.add_argument("more", nargs="*", help="overrides, such as steps=1000")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    # The programs are the same in all runs of a setting.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str((given.out / "cache").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    settings = [text.split(",") for text in (given.inside, given.targets, given.seeds)]
    for seed, inside, target in itertools.product(settings[2], settings[0], settings[1]):
        workdir = folder(given.out, target, inside, seed)
        if given.markdown or (workdir / "summary.json").exists():
            continue
        overrides = (f"target={target}", f"target_in_mixture={inside}", f"seed={seed}")
        subprocess.run(
            [sys.executable, "-m", "bilevel_flax.cli", "train", "--config", str(CONFIG)]
            + ["--workdir", str(workdir)]
            + [f"--config.{text}" for text in (*overrides, *given.more)],
            check=True,
            cwd=ROOT,
            env=environment,
        )
        write(given.out, settings)
    print(write(given.out, settings), flush=True)


def folder(out: Path, target: str, inside: str, seed: str) -> Path:
    """Of one run."""
    return out / f"{Path(target).name}-{inside}-{seed}"


def write(out: Path, settings: list[list[str]]) -> str:
    """The tables of what is there."""
    parts = [setup()]
    for inside, target in itertools.product(settings[0], settings[1]):
        workdirs = [folder(out, target, inside, seed) for seed in settings[2]]
        workdirs = [workdir for workdir in workdirs if (workdir / "baselines.json").exists()]
        if workdirs:
            where = "in the pool as well" if inside == "true" else "not in the pool"
            parts.append(f"Target {Path(target).name}, its text {where}; {table(workdirs)}")
    text = "\n\n".join(parts) + "\n"
    (out / "table.md").write_text(text)
    return text


def setup() -> str:
    """Machine and versions."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")]
    return ", ".join(
        [f"{os.cpu_count()} CPU cores", f"Python {platform.python_version()}", *versions]
    )


def table(workdirs: list[Path]) -> str:
    """Of one setting: a row for each method, ordered by what is left after fine-tuning.

    An interrupted run has some of the methods, so that each row says how many seeds it is of.
    """
    config = read_json(workdirs[0] / "config.json")
    runs = [read_json(workdir / "baselines.json") for workdir in workdirs]
    rows = {}
    for name in (*METHODS, "retrained"):
        if results := [run[name] for run in runs if name in run]:
            after = statistics.mean(result["after"] for result in results)
            cost = f"{results[0]['plain_step_equivalents'] / config['steps']:.2f}"
            columns = [shown([result[when] for result in results]) for when in ("before", "after")]
            cells = [f"**{name}**" if name == "soba" else name, *columns, cost, str(len(results))]
            rows[name] = after, f"| {' | '.join(cells)} |"
    lines = [
        f"{len(runs)} seeds, {config['steps'] * config['batch_size'] * config['length']:,} bytes",
        "",
        "| | before fine-tuning | after | cost, in trainings | seeds |",
        "|---|---|---|---|---|",
        *(line for _, line in sorted(rows.values())),
    ]
    summaries = [workdir / "summary.json" for workdir in workdirs]
    summaries = [read_json(path) for path in summaries if path.exists()]
    for key in ("mixture", "dds_mixture") if summaries else ():
        names = sorted(summaries[0][key], key=lambda name: -summaries[0]["mixture"][name])
        shares = [f"{name} {shown([run[key][name] for run in summaries], 2)}" for name in names]
        lines += ["", f"{key}: " + ", ".join(shares)]
    return "\n".join(lines)


def shown(values: list[float], digits: int = 3) -> str:
    """Mean and, of several, deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
