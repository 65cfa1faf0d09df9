"""Tables of features: breast_cancer (bundled with scikit-learn), ijcnn1, covtype."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_flax.train.config import ConfigError, check_choice
from examples.datasets import catalog, ijcnn1
from examples.hyperparameter_selection.exact import Data

NAMES = ("breast_cancer", "ijcnn1", "covtype", "covtype10k")
_COVTYPE10K = ("covtype.5000.train.csv.gz", "covtype.5000.test.csv.gz")
_COVTYPE_SIZES = (371_847, 92_962)
_COVTYPE_SHAPE = (581_012, 54)
_COVTYPE_CLASSES = 7


class Features(NamedTuple):
    """A table in two parts.

    Attributes:
        train: inputs float64 [n, features] (covtype: float32); labels -1 and 1, or 0 ..
            num_classes - 1.
        validation: the same.
        num_classes: 0 for labels -1 and 1.
    """

    train: Data
    validation: Data
    num_classes: int


def load(
    name: str, manual_dir: str | None = None, seed: int = 0, data_dir: str | None = None
) -> Features:
    """Loads a table and its split.

    Args:
        name: "breast_cancer" (569 x 30, halved at random), "ijcnn1" (49,990 and 91,701 x 22, the
            published split), "covtype" (371,847 and 92,962 x 54 in 7 classes, drawn at random,
            fetched by scikit-learn), or "covtype10k" (a binary subset of it, 4,858 and 5,142).
        manual_dir: the folder of the original files of ijcnn1 or covtype10k, or the one above.
            Without it ijcnn1 is fetched from LIBSVM's page.
        seed: of the random splits.
        data_dir: where the prepared ijcnn1 is kept; None: TFDS's folder.

    Raises:
        ConfigError: an unknown name (the nearest is named), missing files, no network.
    """
    readers = {
        "breast_cancer": _breast_cancer,
        "ijcnn1": lambda _: _ijcnn1(manual_dir, data_dir),
        "covtype": _covtype,
        "covtype10k": lambda _: _covtype10k(manual_dir),
    }
    check_choice(f"--config.data.name={name}", name, readers)
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
        existing = [next(filter(Path.is_file, paths), None) for paths in candidates]
        if all(existing):
            return [path for path in existing if path is not None]
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


def _ijcnn1(manual_dir: str | None, data_dir: str | None) -> Features:
    try:
        parts = ijcnn1.load(manual_dir, data_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Features(Data(*parts["train"]), Data(*parts["test"]), 0)


def _covtype(seed: int) -> Features:
    inputs, labels = _fetched_covtype()
    low, high = inputs.min(0), inputs.max(0)
    inputs -= low
    inputs /= np.where(high > low, high - low, 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, validation, _ = np.split(order, np.cumsum(_COVTYPE_SIZES))
    sides = [Data(inputs[part], labels[part]) for part in (train, validation)]
    return Features(sides[0], sides[1], _COVTYPE_CLASSES)


def _fetched_covtype() -> tuple[np.ndarray, np.ndarray]:
    """Inputs float32 [581,012, 54] and labels 0 .. 6; scikit-learn's float64 table is let go."""
    from sklearn import datasets

    try:
        table: Any = datasets.fetch_covtype(download_if_missing=False)
    except OSError as error:
        if not catalog.reachable(_covtype_address()):
            raise ConfigError(
                "data set covtype is not in scikit-learn's data folder and its source cannot be "
                "reached: fetch it where there is a network (sklearn.datasets.fetch_covtype), or "
                "use covtype10k with --config.data.manual_dir=DIR (bench: --manual-dir DIR)"
            ) from error
        try:
            table = datasets.fetch_covtype()
        except OSError as failure:
            raise ConfigError(
                f"data set covtype could not be fetched ({' '.join(str(failure).split())[:200]}): "
                "try again, or use covtype10k with --config.data.manual_dir=DIR (bench: "
                "--manual-dir DIR)"
            ) from failure
    shape = np.shape(table.data)
    if shape != _COVTYPE_SHAPE or set(np.unique(table.target)) != set(range(1, 8)):
        raise ConfigError(
            f"scikit-learn's covtype has the shape {shape} and not {_COVTYPE_SHAPE} with labels "
            "1 .. 7: remove the folder covertype in scikit-learn's data folder, it is fetched again"
        )
    # All values are integers below 2^24, which float32 holds exactly.
    return np.array(table.data, np.float32), np.asarray(table.target, np.int64) - 1


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
        table = np.loadtxt(path, delimiter=",", dtype=np.float64, ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read as CSV ({reason}): fetch it again") from error
    if table.shape[1] != 1 + _COVTYPE_SHAPE[1]:
        raise ConfigError(
            f"{path} has {table.shape[1]} columns: the label and {_COVTYPE_SHAPE[1]} features are "
            "expected, fetch it again"
        )
    other = table[~np.isin(table[:, 0], (-1, 1)), 0]
    if len(other):
        raise ConfigError(f"{path} has the label {other[0]:g}: -1 and 1 are expected")
    return Data(table[:, 1:], (table[:, 0] > 0).astype(np.int64))
