"""Tables of features: breast_cancer (bundled with scikit-learn), ijcnn1, covtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_flax.config import ConfigError, nearest
from bilevel_flax.data import catalog
from examples.hyperparameter_selection.exact import Data

NAMES = ("breast_cancer", "ijcnn1", "covtype", "covtype10k")
_IJCNN1 = (("ijcnn1.trn.bz2", "ijcnn1.bz2"), ("ijcnn1.tst.bz2", "ijcnn1.t.bz2"))
_IJCNN1_FEATURES = 22
_COVTYPE10K = ("covtype.5000.train.csv.gz", "covtype.5000.test.csv.gz")
_COVTYPE_SIZES = (371_847, 92_962)


class Features(NamedTuple):
    """A table in two parts.

    Attributes:
        train: inputs float64 [n, features]; labels -1 and 1, or 0 .. num_classes - 1.
        validation: the same.
        num_classes: 0 for labels -1 and 1.
    """

    train: Data
    validation: Data
    num_classes: int


def load(name: str, manual_dir: str | None = None, seed: int = 0) -> Features:
    """Loads a table and its split.

    Args:
        name: "breast_cancer" (569 x 30, halved at random), "ijcnn1" (49,990 and 91,701 x 22, the
            published split), "covtype" (371,847 and 92,962 x 54 in 7 classes, drawn at random,
            fetched by scikit-learn), or "covtype10k" (a binary subset of it, 4,858 and 5,142).
        manual_dir: the folder of the original files of ijcnn1 or covtype10k, or the one above.
        seed: of the random splits.

    Raises:
        ConfigError: an unknown name (the nearest is named), missing files, no network.
    """
    readers = {
        "breast_cancer": _breast_cancer,
        "ijcnn1": lambda _: _ijcnn1(manual_dir),
        "covtype": _covtype,
        "covtype10k": lambda _: _covtype10k(manual_dir),
    }
    if name not in readers:
        raise ConfigError(
            f"--config.data.name={name}: choose one of {', '.join(NAMES)}"
            f"{nearest(name, list(NAMES))}"
        )
    return readers[name](seed)


def folder_of(manual_dir: str | None, name: str, files) -> list[Path] | None:
    """The files in `manual_dir` or in its subfolder `name`; None unless all are there.

    Args:
        manual_dir: a folder, or None.
        name: of the data set.
        files: for each file the names that it may have.
    """
    for folder in [] if manual_dir is None else [Path(manual_dir), Path(manual_dir) / name]:
        folder = folder.expanduser()
        candidates = [[folder / name for name in names] for names in files]
        found = [next(filter(Path.is_file, paths), None) for paths in candidates]
        if all(found):
            return [path for path in found if path is not None]
    return None


def _missing(name: str, manual_dir: str | None, files) -> ConfigError:
    listed = " and ".join(names[0] for names in files)
    if manual_dir is None:
        return ConfigError(
            f"data set {name} needs its original files: put {listed} into a folder and pass it as "
            "--config.data.manual_dir=DIR (bench: --manual-dir DIR), or use breast_cancer, which "
            "is bundled"
        )
    return ConfigError(f"manual_dir={manual_dir} lacks {listed}: data set {name} is read from them")


def _breast_cancer(seed: int) -> Features:
    from sklearn import datasets

    table: Any = datasets.load_breast_cancer()
    inputs = np.asarray(table.data, np.float64)
    labels = np.where(np.asarray(table.target) > 0, 1, -1)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, validation = np.array_split(order, 2)
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    sides = [Data(inputs[part], labels[part]) for part in (train, validation)]
    return Features(sides[0], sides[1], 0)


def _ijcnn1(manual_dir: str | None) -> Features:
    paths = folder_of(manual_dir, "ijcnn1", _IJCNN1)
    if paths is None:
        raise _missing("ijcnn1", manual_dir, _IJCNN1)
    train, validation = (_svmlight(path, _IJCNN1_FEATURES) for path in paths)
    return Features(train, validation, 0)


def _svmlight(path: Path, num_features: int) -> Data:
    from sklearn import datasets  # slow to import: a missing file is said first

    try:
        inputs, labels = datasets.load_svmlight_file(str(path), n_features=num_features)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as svmlight ({error}): fetch it again") from error
    return Data(np.asarray(inputs.toarray(), np.float64), np.where(labels > 0, 1, -1))


def _covtype(seed: int) -> Features:
    from sklearn import datasets

    try:
        table = datasets.fetch_covtype(download_if_missing=False)
    except OSError as error:
        if not catalog.reachable(_covtype_address()):
            raise ConfigError(
                "data set covtype is not in scikit-learn's data folder and its source cannot be "
                "reached: fetch it where there is a network (sklearn.datasets.fetch_covtype), or "
                "use covtype10k with --config.data.manual_dir=DIR (bench: --manual-dir DIR)"
            ) from error
        table: Any = datasets.fetch_covtype()
    inputs = np.asarray(table.data, np.float64)
    labels = np.asarray(table.target, np.int64) - 1
    low, high = inputs.min(0), inputs.max(0)
    inputs = (inputs - low) / np.where(high > low, high - low, 1.0)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, validation, _ = np.split(order, np.cumsum(_COVTYPE_SIZES))
    sides = [Data(inputs[part], labels[part]) for part in (train, validation)]
    return Features(sides[0], sides[1], 7)


def _covtype_address() -> str:
    # scikit-learn keeps it in a private place, which may move.
    from sklearn.datasets import _covtype as module

    return getattr(getattr(module, "ARCHIVE", None), "url", "https://scikit-learn.org")


def _covtype10k(manual_dir: str | None) -> Features:
    files = [(name,) for name in _COVTYPE10K]
    paths = folder_of(manual_dir, "covtype10k", files)
    if paths is None:
        raise _missing("covtype10k", manual_dir, files)
    train, validation = (_csv(path) for path in paths)
    return Features(train, validation, 2)


def _csv(path: Path) -> Data:
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float64)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as CSV ({error}): fetch it again") from error
    return Data(table[:, 1:], (table[:, 0] > 0).astype(np.int64))
