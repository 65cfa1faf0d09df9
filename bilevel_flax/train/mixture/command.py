"""`bilevel-flax mixture RUN --to READER --out FILE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_flax.checks import check_count
from bilevel_flax.train.errors import ConfigError, nearest
from bilevel_flax.train.mixture.learned import LearnedMixture, load
from bilevel_flax.train.mixture.readers import ONE_MIXTURE, READERS, Plan
from bilevel_flax.train.workdir import read_json, write_json

_MOST_STAGES = 1000


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's arguments.

    Attributes:
        workdir: RUN, a run's folder.
        to: the reader, a key of `READERS`.
        out: the file to write; there must be none of its name.
        reader: a JSON file of the reader's: a list of its domains, or an object by domain, whose
            `path` entries are kept; None: the run's own domains.
        tokens: of the reader's run; None: as many as this one's.
        length: tokens of a sequence of the reader's; None: as here.
        stages: of the curriculum, at most.
        stage: which of them, where the reader takes one mixture; None: the end point.
        block_size: Levanter's `mixture_block_size`, in sequences.

    Example:
        >>> from pathlib import Path
        >>> from bilevel_flax.train import mixture
        >>> mixture.Options(Path("runs/mix"), to="levanter", out=Path("mix.json")).block_size
        2048
    """

    workdir: Path
    to: str
    out: Path
    reader: Path | None = None
    tokens: int | None = None
    length: int | None = None
    stages: int = 8
    stage: int | None = None
    block_size: int = 2048


def export(options: Options) -> str:
    """Writes the file; returns the lines to print.

    Raises:
        ConfigError: an unknown reader, a stage for one that takes all, a run without a mixture,
            domains that differ from the reader's, a file that is there already or cannot be
            written.

    Example:
        >>> import json, pathlib, tempfile
        >>> from bilevel_flax.train import mixture
        >>> run = pathlib.Path(tempfile.mkdtemp())  # of a finished run, in truth
        >>> shares = {"wiki": 0.7, "code": 0.3}
        >>> _ = (run / "summary.json").write_text(json.dumps({"mixture": shares}))
        >>> config = {"steps": 9, "batch_size": 8, "length": 64}
        >>> _ = (run / "config.json").write_text(json.dumps(config))
        >>> lines = mixture.export(mixture.Options(run, to="json", out=run / "mix.json"))
        >>> json.loads((run / "mix.json").read_text())["mixture"]
        {'wiki': 0.7, 'code': 0.3}
    """
    if options.to not in READERS:
        known = list(READERS)
        raise ConfigError(
            f"--to={options.to}: choose one of {', '.join(known)}{nearest(options.to, known)}"
        )
    counts = {
        "--stages": options.stages,
        "--block-size": options.block_size,
        "--tokens": options.tokens,
        "--length": options.length,
    }
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)
    if options.stages > _MOST_STAGES:
        raise ConfigError(f"--stages={options.stages}: give {_MOST_STAGES} or fewer")
    if options.stage is not None:
        check_count("--stage", options.stage, 0)
        if options.to not in ONE_MIXTURE:
            raise ConfigError(
                f"--stage={options.stage}: --to {options.to} takes all stages; one alone is for "
                f"{' and '.join(ONE_MIXTURE)}"
            )
    mixture = load(options.workdir)
    content, notes = READERS[options.to](mixture, _plan(mixture, options))
    try:
        _write(options.out, content)
    except OSError as error:
        raise ConfigError(f"--out={options.out} cannot be written: {error.strerror}") from error
    return "\n".join([str(options.out), *(f"note: {note}" for note in notes)])


def _write(out: Path, content: Any) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out={out} is there already: choose another name or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out={out}: there is no folder {out.parent}")
    write_json(out, content)


def _plan(mixture: LearnedMixture, options: Options) -> Plan:
    names, paths = list(mixture.shares), mixture.paths
    if options.reader is not None:
        names, paths = _readers_domains(options.reader, mixture)
    length = options.length or mixture.length
    if options.tokens is not None:
        if length is None:
            raise ConfigError(
                f"--tokens={options.tokens}: the run does not say how long a sequence is: give "
                "--length as well"
            )
        sequences = options.tokens // length
    elif mixture.sequences is not None and mixture.length is not None and length is not None:
        sequences = mixture.sequences * mixture.length // length
    else:
        sequences = mixture.sequences or mixture.steps
    if sequences < 1:
        raise ConfigError(f"--tokens={options.tokens} are less than one sequence of {length}")
    return Plan(sequences, length, options.stages, options.stage, options.block_size, names, paths)


def _readers_domains(path: Path, mixture: LearnedMixture) -> tuple[list[str], dict[str, str]]:
    try:
        content: Any = read_json(path)
    except OSError as error:
        raise ConfigError(f"--reader={path}: {error.strerror}") from error
    if not isinstance(content, (list, dict)) or not all(isinstance(name, str) for name in content):
        raise ConfigError(
            f"--reader={path}: must hold a list of the reader's domains or an object by domain"
        )
    names = list(content)
    learned = set(mixture.shares)
    if set(names) != learned or len(names) != len(learned):
        only_here = ", ".join(map(repr, sorted(learned - set(names)))) or "none"
        only_there = ", ".join(map(repr, sorted(set(names) - learned))) or "none"
        raise ConfigError(
            f"--reader={path}: its domains differ from the run's (only in the run: {only_here}; "
            f"only in the reader: {only_there}): a share for each of them can only come from a run "
            "on these domains"
        )
    entries = content.items() if isinstance(content, dict) else ()
    paths = {
        name: entry["path"]
        for name, entry in entries
        if isinstance(entry, Mapping) and isinstance(entry.get("path"), str)
    }
    return names, {**mixture.paths, **paths}
