"""Domains of text: bytes in, windows of tokens out.

Tokens are bytes (0 .. 255), so that any file will do, in any encoding; plain or .gz. A NumPy file
(.npy, integers [n]) is taken as the tokens of a tokeniser of your own.
"""

from __future__ import annotations

import ast
import gzip
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bilevel_flax
from bilevel_flax.train.config import ConfigError, check_choice

# Domain -> file, in the folder `text` of BILEVEL_FLAX_DATA.
FILES = {
    "shakespeare": "shakespeare.txt.gz",
    "wikipedia": "wikitext2.valid.txt.gz",
    "python": "python_stdlib.txt.gz",
    "german": "kafka_verwandlung_de.txt.gz",
}


class Windows(NamedTuple):
    """Pieces of text, all of one length.

    Attributes:
        tokens: integers [n, length + 1]; the last one is only predicted.
        domain: int32 [n].
    """

    tokens: np.ndarray
    domain: np.ndarray


def found_files() -> dict[str, Path]:
    """Domain -> file, of those of `FILES` that BILEVEL_FLAX_DATA has.

    Raises:
        ConfigError: it names a folder that is not there, or has no text: to train on other text
            instead, without a word, would be the worst of answers.
    """
    root = os.environ.get("BILEVEL_FLAX_DATA")
    if not root:
        return {}
    folder = Path(root).expanduser() / "text"
    files = {name: folder / file for name, file in FILES.items() if (folder / file).is_file()}
    if not files:
        raise ConfigError(
            f"BILEVEL_FLAX_DATA={root}: there is no {folder / FILES['shakespeare']} nor any other "
            "text; name the folder that holds text/, or unset it to train on the package's source"
        )
    return files


def load(files: Sequence[str] | Mapping[str, str | Path] | None) -> dict[str, np.ndarray]:
    """Domain -> its tokens.

    Args:
        files: paths by the domain's name, or paths alone, each named after its file; None: those
            of `FILES` where BILEVEL_FLAX_DATA has them, else the package's own source and its
            docstrings.

    Raises:
        ConfigError: a file that is not there, that is empty, or two of one name.
    """
    if isinstance(files, Mapping):
        return {
            name: read(Path(path).expanduser(), f"--config.domains.{name}")
            for name, path in files.items()
        }
    if files is None:
        paths = found_files()
        if not paths:
            return own_text()
    else:
        paths = {}
        for file in files:
            name = Path(file).name.partition(".")[0]
            if name in paths:
                raise ConfigError(f"--config.data.files: two files are called {name}: rename one")
            paths[name] = Path(file).expanduser()
    return {name: read(path, "--config.data.files") for name, path in paths.items()}


def read(path: Path, key: str) -> np.ndarray:
    """The tokens of one file; what is not packed is mapped, not read.

    Args:
        path: the file.
        key: of the config, for errors.

    Raises:
        ConfigError: it is not there, cannot be read, or is empty.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, allow_pickle=False, mmap_mode="r")
            if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
                raise ConfigError(
                    f"{key}={path}: must hold integers [n], found "
                    f"{tokens.dtype}{list(tokens.shape)}"
                )
        elif path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                tokens = np.frombuffer(file.read(), np.uint8)
        elif path.is_file() and not path.stat().st_size:  # nothing to map
            tokens = np.zeros(0, np.uint8)
        else:
            tokens = np.memmap(path, np.uint8, mode="r")
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key}={path}: {why}") from error
    if not len(tokens):
        raise ConfigError(f"{key}={path}: the file is empty")
    return tokens


def own_text() -> dict[str, np.ndarray]:
    """Two small domains that are always there: the package's source, and its docstrings."""
    sources = [
        p.read_text("utf-8") for p in sorted(Path(bilevel_flax.__file__).parent.rglob("*.py"))
    ]
    prose = [
        ast.get_docstring(node)
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    texts = {"source": "\n".join(sources), "docstrings": "\n\n".join(filter(None, prose))}
    return {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}


class Parts(NamedTuple):
    """The text of a run: the mixture, and three parts of the target."""

    mixture: dict[str, np.ndarray]  # every domain, the target's rest among them
    outer: np.ndarray
    held_out: np.ndarray


def split(domains: dict[str, np.ndarray], target: str | None, share: float) -> Parts:
    """Takes two shares at the end of the target's text away: for F, and to be measured on.

    Raises:
        ConfigError: no such domain, or a share that leaves nothing.
    """
    target = next(iter(domains)) if target is None else target
    check_choice(f"--config.data.target={target}", target, domains)
    if not 0 < share < 0.5:
        raise ConfigError(f"--config.data.outer_share={share}: must lie in (0, 0.5)")
    tokens = domains[target]
    size = max(1, round(share * len(tokens)))
    cuts = len(tokens) - 2 * size, len(tokens) - size
    rest, outer, held_out = np.split(np.asarray(tokens), cuts)
    return Parts({**domains, target: rest}, outer, held_out)


def windows(tokens: np.ndarray, length: int, at_least: int, name: str) -> np.ndarray:
    """Consecutive windows [n, length + 1]; they overlap only where fewer than `at_least` fit.

    Raises:
        ConfigError: the text is too short even for overlapping ones.
    """
    last = len(tokens) - length - 1  # the last start
    if last < at_least - 1:
        raise ConfigError(
            f"the text of {name} has {len(tokens)} tokens, too few for {at_least} windows of "
            f"{length} + 1: give more text, or a smaller --config.length or --config.batch_size"
        )
    stride = min(length, last // (at_least - 1)) if at_least > 1 else length
    starts = np.arange(0, last + 1, stride)
    return np.asarray(tokens)[starts[:, None] + np.arange(length + 1)]


def mixture(domains: dict[str, np.ndarray], length: int, batch_size: int) -> Windows:
    """The windows of all domains.

    Raises:
        ConfigError: a domain is too short for one window, all of them for one minibatch.
    """
    cut = {name: windows(tokens, length, 1, name) for name, tokens in domains.items()}
    missing = batch_size - sum(len(part) for part in cut.values())
    if missing > 0:  # a short text and a large minibatch: the longest domain's windows overlap
        longest = max(domains, key=lambda name: len(domains[name]))
        wanted = len(cut[longest]) + missing
        cut[longest] = windows(domains[longest], length, wanted, longest)
    return Windows(
        np.concatenate([cut[name] for name in domains]),
        np.repeat(np.arange(len(domains), dtype=np.int32), [len(cut[name]) for name in domains]),
    )
