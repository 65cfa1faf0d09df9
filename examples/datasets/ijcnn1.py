"""ijcnn1, from LIBSVM's page or from original files, through a prepared TFDS set.

The two parts exist in several files: LIBSVM's, and copies under other names and in another
notation of the same numbers. So what counts is a checksum of the numbers, in whichever file they
came; the files whose own checksums are known are checked before they are parsed.
"""

from __future__ import annotations

import bz2
import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from examples.datasets import catalog, decoded, originals, prepared

NAME = "ijcnn1"
PAGE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html"
NUM_FEATURES = 22
_FOLDER = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
# Every number of the original has at most six decimals: millionths are exact, and so is the float64
# nearest to each, even after TFDS has stored it as a float32.
_UNIT = 1e6


class Table(NamedTuple):
    """Examples: inputs float64 [n, 22], labels int [n] of -1 and 1."""

    inputs: np.ndarray
    labels: np.ndarray


class Part(NamedTuple):
    """One of the two parts.

    Attributes:
        url: where LIBSVM has it.
        filenames: what the file may be called in a manual_dir, the preferred name first.
        known: files whose bytes are known, by name.
        rows: examples.
        content: sha256 of the numbers, see `digest`.
    """

    url: str
    filenames: tuple[str, ...]
    known: dict[str, catalog.Original]
    rows: int
    content: str


def _part(url: str, filename: str, size: int, sha256: str, rows: int, content: str) -> Part:
    known = {filename: catalog.Original(url, size, sha256, filename)}
    return Part(url, (filename, url.rpartition("/")[2]), known, rows, content)


PARTS = {
    "train": _part(
        f"{_FOLDER}ijcnn1.bz2",
        "ijcnn1.trn.bz2",
        1_395_175,
        "b38a4198ce142d43e96fb86d17b87211feec1f909ac344fa057455c69de29de3",
        49_990,
        "17eb249c6ec6706a86cf2d48f2474189df31c27aadc4b1180e4f849d34c977ad",
    ),
    "test": _part(
        f"{_FOLDER}ijcnn1.t.bz2",
        "ijcnn1.tst.bz2",
        2_597_597,
        "acd1db430684fdd3f0c768ecc49aa8e749d0004fc117611220c2aa576a7b6a24",
        91_701,
        "4a166d131d7c78b680ab9395e9dec3794ec884cadf14e6500b25c76c341212e5",
    ),
}


def load(
    manual_dir: str | pathlib.Path | None = None, data_dir: str | pathlib.Path | None = None
) -> dict[str, Table]:
    """The two parts of ijcnn1.

    A prepared set in `data_dir` is read; otherwise it is prepared, once, from the files in
    `manual_dir`, or from LIBSVM's page where there is a network.

    Args:
        manual_dir: a folder with both files, or the one above a folder `ijcnn1` with them.
        data_dir: a folder of prepared sets; None: TFDS's ($TFDS_DATA_DIR or ~/tensorflow_datasets).

    Returns:
        {"train": Table, "test": Table}, 49,990 and 91,701 examples in their original order.

    Raises:
        ValueError: missing, damaged or other files, no network; one line, naming file and fix.
    """
    folder = pathlib.Path(data_dir).expanduser() if data_dir else prepared.default_data_dir()
    where = prepared.find(folder, NAME)
    if where is None:
        where, tables = _prepare(folder, manual_dir)
        if tables is not None:
            return tables
    cached = decoded.load(where)
    if cached is None:
        columns = prepared.read_columns(where, tuple(PARTS), ("input", "label"))
        tables = {
            name: Table(
                _millionths(columns[f"{name}_input"]) / _UNIT,
                np.where(columns[f"{name}_label"] > 0, 1, -1),
            )
            for name in PARTS
        }
        _keep(where, tables)
    else:
        tables = {
            name: Table(
                cached[f"{name}_millionths"] / _UNIT, cached[f"{name}_labels"].astype(np.int64)
            )
            for name in PARTS
        }
    for name, part in PARTS.items():
        _check_content(tables[name], part, f"the prepared set {where}", "delete that folder")
    return tables


def _keep(folder: pathlib.Path, tables: dict[str, Table]) -> None:
    arrays = {}
    for name, table in tables.items():
        arrays[f"{name}_millionths"] = _millionths(table.inputs)
        arrays[f"{name}_labels"] = table.labels.astype(np.int8)
    decoded.save(folder, arrays)


def _prepare(
    folder: pathlib.Path, manual_dir: str | pathlib.Path | None
) -> tuple[pathlib.Path, dict[str, Table] | None]:
    """The folder of the prepared set, and the tables where they had to be parsed for it."""
    where = f'data set "{NAME}" is not prepared in {folder}'
    names = " and ".join(part.filenames[0] for part in PARTS.values())
    own = " and ".join(part.filenames[1] for part in PARTS.values())
    wanted = f"{names} (or {own} from {PAGE})"
    if manual_dir is None:
        if not catalog.reachable(PARTS["train"].url):
            raise ValueError(
                f"{where} and its source cannot be reached: put {wanted} into a folder and pass it "
                "with --config.data.manual_dir=DIR (bench: --manual-dir DIR), or use breast_cancer"
            )
        return _build(folder, None), None
    manual = pathlib.Path(manual_dir).expanduser()
    if not manual.is_dir():
        raise ValueError(f"{where} and manual_dir={manual} is no folder: it must hold {wanted}")
    files = manual_files(manual)
    if files is None:
        raise ValueError(f"{where} and manual_dir={manual} lacks {wanted}")
    # Here, in a fraction of the time that TFDS takes, a mistake is found before TFDS starts.
    tables = {name: parse(path, PARTS[name]) for name, path in files.items()}
    where = _build(folder, files["train"].parent)
    _keep(where, tables)
    return where, tables


def _build(folder: pathlib.Path, manual_dir: pathlib.Path | None) -> pathlib.Path:
    from examples.datasets.ijcnn1_dataset_builder import Builder  # imports TFDS

    return originals.build(Builder, NAME, None, folder, manual_dir, registered=False)


def manual_files(folder: pathlib.Path) -> dict[str, pathlib.Path] | None:
    """Both files in `folder` or in its subfolder `ijcnn1`; None unless both are there."""
    for place in (folder, folder / NAME):
        paths = {
            name: next(filter(pathlib.Path.is_file, (place / f for f in part.filenames)), None)
            for name, part in PARTS.items()
        }
        if all(paths.values()):
            return {name: path for name, path in paths.items() if path is not None}
    return None


def parse(path: pathlib.Path, part: Part) -> Table:
    """Reads a bzip2 file of svmlight text, and makes sure of its content.

    Args:
        path: the file.
        part: what it should hold.

    Raises:
        ValueError: it is damaged or holds something else; one line.
    """
    if path.name in part.known:
        catalog.verify(path, part.known[path.name])
    from sklearn import datasets  # slow to import: a missing file is said first

    try:
        # As a stream: scikit-learn goes by the file's name, and TFDS renames what it downloads.
        with bz2.open(path) as stream:
            inputs, labels = datasets.load_svmlight_file(stream, n_features=NUM_FEATURES)
    except (OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as svmlight ({reason}): fetch it again") from error
    other = labels[~np.isin(labels, (-1, 1))]
    if len(other):
        raise ValueError(
            f"{path} has the label {other[0]:g}: ijcnn1's are -1 and 1, fetch it from {PAGE}"
        )
    table = Table(inputs.toarray(), labels.astype(np.int64))
    _check_content(table, part, str(path), f"fetch it from {PAGE}")
    return table


def _check_content(table: Table, part: Part, where: str, fix: str) -> None:
    if table.inputs.shape != (part.rows, NUM_FEATURES):
        rows, columns = table.inputs.shape
        raise ValueError(
            f"{where} has {rows:,} rows of {columns} features, and not {part.rows:,} of "
            f"{NUM_FEATURES}: {fix}"
        )
    if digest(table) != part.content:
        raise ValueError(f"{where} holds other numbers than ijcnn1 (wrong checksum): {fix}")


def digest(table: Table) -> str:
    """sha256 of the inputs in millionths and of the labels, whatever the notation was."""
    checksum = hashlib.sha256(_millionths(table.inputs).astype("<i4").tobytes())
    checksum.update(table.labels.astype("<i1").tobytes())
    return checksum.hexdigest()


def _millionths(inputs: np.ndarray) -> np.ndarray:
    return np.round(np.asarray(inputs, np.float64) * _UNIT).astype(np.int32)
