"""Learned data mixtures against the baselines: two targets, three seeds, with and without its text.

    python benchmarks/lm_data_mixing.py --out runs/lm

Runs that are there are not repeated, and an interrupted one goes on. Prints, and writes to
`table.md`, means and deviations over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

from bilevel_flax.train.workdir import read_json

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "lm_data_mixing.py"
COLUMNS = ("soba", "retrained", "uniform", "direct_mix", "classifier", "dds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default="shakespeare,python")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--inside", default="false,true", help="is the target's text in the pool?")
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
        workdir = given.out / f"{target}-{inside}-{seed}"
        if not (workdir / "summary.json").exists():
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


def write(out: Path, settings: list[list[str]]) -> None:
    """The tables of what is there."""
    parts = []
    for inside, target in itertools.product(settings[0], settings[1]):
        files = [out / f"{target}-{inside}-{seed}" / "summary.json" for seed in settings[2]]
        runs = [read_json(file) for file in files if file.exists()]
        if not runs:
            continue
        where = "in the pool as well" if inside == "true" else "not in the pool"
        lines = [
            f"Target {target}, its text {where}; {len(runs)} seeds, {runs[0]['tokens']:,} bytes",
            "",
            "| | " + " | ".join(COLUMNS) + " |",
            "|---|" + "---|" * len(COLUMNS),
        ]
        for when in ("before", "after"):
            cells = [shown([numbers(summary)[name][when] for summary in runs]) for name in COLUMNS]
            lines.append(f"| {when} fine-tuning | " + " | ".join(cells) + " |")
        names = sorted(runs[0]["mixture"], key=lambda name: -runs[0]["mixture"][name])
        for key in ("mixture", "dds_mixture"):
            shares = [f"{name} {shown([s[key][name] for s in runs], 2)}" for name in names]
            lines += ["", f"{key}: " + ", ".join(shares)]
        parts.append("\n".join(lines))
    text = "\n\n".join(parts) + "\n"
    (out / "table.md").write_text(text)
    print(text, flush=True)


def numbers(summary: dict) -> dict:
    """Method -> nats per byte on the test text."""
    return summary["nats_per_byte"] | {"retrained": summary["retrained_nats_per_byte"]}


def shown(values: list[float], digits: int = 3) -> str:
    """Mean and deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
