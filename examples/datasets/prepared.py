"""Prepared TFDS sets on disk: found without importing TFDS, decoded once into arrays."""

import io
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from examples.datasets import decoded

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_AT_ONCE = 2048  # examples a read: one call a record costs ten times as much


class Part(NamedTuple):
    """One split: images uint8 [n, height, width, channels], labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray


def default_data_dir() -> pathlib.Path:
    """TFDS's own default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    chosen = os.environ.get("TFDS_DATA_DIR")
    return pathlib.Path(chosen) if chosen else pathlib.Path.home() / "tensorflow_datasets"


def find(data_dir: pathlib.Path, name: str, version: str | None = None) -> pathlib.Path | None:
    """The folder of a prepared set.

    Args:
        data_dir: where prepared sets live, [data_dir]/[name]/[version].
        name: "mnist", or with a configuration "emnist/balanced".
        version: None takes the newest.

    Returns:
        None where there is no complete one.

    Raises:
        ValueError: it is there, in a format that only TensorFlow can read.
    """
    folders = [
        path
        for path in (data_dir / name).glob("*.*.*")
        if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").is_file()
    ]
    if version is not None:
        folders = [path for path in folders if path.name == version]
    if not folders:
        return None
    folder = max(folders, key=lambda path: [int(part) for part in path.name.split(".")])
    file_format = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
    if file_format != "array_record":
        raise ValueError(
            f"{folder} is prepared as {file_format or 'tfrecord'}, which only TensorFlow reads: "
            f"prepare it again with `tfds build {name} --file_format=array_record`, or point "
            "--config.data.data_dir at another folder"
        )
    return folder


def read(folder: pathlib.Path) -> tuple[dict[str, Part], list[str]]:
    """Decodes the training and the test part of a prepared set of labelled images.

    Args:
        folder: as `find` returns it.

    Returns:
        ({"train": Part, "test": Part}, names of the classes). A set without a test part of its own
        has only "train"; one whose only other part is called "validation" has that as "test".

    Raises:
        ValueError: it has no `image` and `label` features, its images differ in size or are not
            8-bit, or a file is damaged.
    """
    cached = decoded.load(folder)
    if cached is None:
        parts, names = _read_records(folder)
        arrays = {
            f"{part}_{field}": array
            for part, fields in parts.items()
            for field, array in fields._asdict().items()
        }
        decoded.save(folder, {**arrays, "class_names": np.array(names, dtype=np.str_)})
        return parts, names
    parts = {
        part: Part(cached[f"{part}_images"], cached[f"{part}_labels"])
        for part in ("train", "test")
        if f"{part}_images" in cached
    }
    return parts, cached["class_names"].tolist()


def _read_records(folder: pathlib.Path) -> tuple[dict[str, Part], list[str]]:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(folder))
    features: dict[str, Any] = dict(builder.info.features.items())
    wanted = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if not all(isinstance(features.get(key), kind) for key, kind in wanted.items()):
        raise ValueError(
            f"{folder} is no image classification set: it needs the features `image` and `label`, "
            f"and has {', '.join(features)}"
        )
    image, label = features["image"], features["label"]
    shape, dtype = tuple(image.shape), np.dtype(image.np_dtype)
    if None in shape or dtype != np.uint8 or shape[-1] not in (1, 3):
        raise ValueError(
            f"{folder} has images of shape {list(shape)} and type {dtype}: "
            "only 8-bit images of one size, grey or RGB, can be held as one array"
        )
    if "train" not in builder.info.splits:
        raise ValueError(f'{folder} has no split "train", only {", ".join(builder.info.splits)}')
    names = {"train": "train"}
    other = [name for name in ("test", "validation") if name in builder.info.splits]
    if other:
        names["test"] = other[0]
    skip = {"image": tfds.decode.SkipDecoding()}
    try:
        parts = {
            part: _decode(builder.as_data_source(split=split, decoders=skip), shape)
            for part, split in names.items()
        }
    except Exception as error:  # array_record raises bare RuntimeErrors for a damaged file
        raise ValueError(_unreadable(folder, error)) from error
    return parts, list(label.names)


def read_columns(
    folder: pathlib.Path, parts: Sequence[str], features: Sequence[str]
) -> dict[str, np.ndarray]:
    """Reads numeric features of a prepared set.

    Args:
        folder: as `find` returns it.
        parts: names of splits.
        features: names of features, one number or one array of a fixed shape an example.

    Returns:
        "[part]_[feature]" -> array [examples, ...], in the order of the records.

    Raises:
        ValueError: a file is damaged, a part or a feature is not there.
    """
    import tensorflow_datasets as tfds

    columns = {}
    try:
        builder: Any = tfds.builder_from_directory(str(folder))
        for part in parts:
            source = builder.as_data_source(split=part)
            records = []
            for start in range(0, len(source), _AT_ONCE):
                stop = min(start + _AT_ONCE, len(source))
                records += source.__getitems__(range(start, stop))
            for name in features:
                columns[f"{part}_{name}"] = np.stack([record[name] for record in records])
    except Exception as error:  # array_record raises bare RuntimeErrors for a damaged file
        raise ValueError(_unreadable(folder, error)) from error
    return columns


def _unreadable(folder: pathlib.Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{folder} cannot be read ({reason}): delete that folder and run again"


def _decode(source: Any, shape: tuple[int, int, int]) -> Part:
    n, mode = len(source), "L" if shape[-1] == 1 else "RGB"
    images, labels = np.empty((n, *shape), np.uint8), np.empty(n, np.int32)
    for start in range(0, n, _AT_ONCE):
        records = source.__getitems__(range(start, min(start + _AT_ONCE, n)))
        for i, record in enumerate(records, start):
            picture = Image.open(io.BytesIO(record["image"]), formats=("PNG", "JPEG"))
            picture = picture if picture.mode == mode else picture.convert(mode)
            images[i] = np.asarray(picture).reshape(shape)
            labels[i] = record["label"]
    return Part(images, labels)
