"""Original files -> a prepared TFDS set in array_record format, without TensorFlow.

TFDS's own builders for these sets read through TensorFlow. Ours derive from them, so that name,
version, features, addresses and registered checksums stay TFDS's and the result is the data set
that TFDS itself would prepare; only the reading is replaced.
"""

import contextlib
import gzip
import io
import pathlib
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from examples.datasets import catalog

Examples = Iterator[tuple[int, dict[str, Any]]]


def missing(name: str, manual_dir: pathlib.Path) -> list[str]:
    """The original files of `name` that `manual_dir` lacks; those it has are verified.

    Raises:
        ValueError: a file is there and is not the original.
    """
    absent = []
    for original in catalog.originals(name):
        path = manual_dir / original.filename
        if path.is_file():
            catalog.verify(path, original)
        else:
            absent.append(original.filename)
    return absent


def prepare(
    name: str, config: str | None, data_dir: pathlib.Path, manual_dir: pathlib.Path | None
) -> pathlib.Path:
    """Writes the prepared set.

    Args:
        name: one of `READERS`.
        config: the builder's configuration ("balanced" of emnist), None for a set without.
        data_dir: where prepared sets live.
        manual_dir: where the original files lie; None downloads them.

    Returns:
        The folder of the prepared set.

    Raises:
        ValueError: no such configuration, `data_dir` cannot be written, or a file is not the
            original; one line each.
    """
    cls = builder_class(name)
    configs = sorted(cls.builder_configs)
    if configs and config not in configs:
        raise ValueError(
            f'data set "{name}" needs one of the configurations {", ".join(configs)}: '
            f'use "{name}/{catalog.nearest(config or "", configs)}"'
        )
    if not configs and config is not None:
        raise ValueError(f'data set "{name}" has no configuration "{config}": use "{name}"')
    return build(cls, name, config, data_dir, manual_dir)


def build(
    cls: Any,
    name: str,
    config: str | None,
    data_dir: pathlib.Path,
    manual_dir: pathlib.Path | None,
    *,
    registered: bool = True,
) -> pathlib.Path:
    """Runs a TFDS builder that needs no TensorFlow.

    Args:
        cls: its class.
        name: of the data set.
        config: its configuration, or None.
        data_dir: where prepared sets live.
        manual_dir: where the original files lie; None downloads them.
        registered: whether the files' checksums are registered with TFDS; otherwise the builder
            makes sure of what it reads.

    Returns:
        The folder of the prepared set.

    Raises:
        ValueError: `data_dir` cannot be written, or a file is not the original; one line each.
    """
    import tensorflow_datasets as tfds  # takes a second: only where something is prepared
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    if manual_dir is not None or not sys.stderr.isatty():
        tfds.disable_progress_bar()
    print(f"preparing {name} in {data_dir} (once)", file=sys.stderr, flush=True)
    folder = data_dir / name / (config or "") / str(cls.VERSION)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = cls(data_dir=str(data_dir), config=config, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # says the same at greater length
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    manual_dir=str(manual_dir) if manual_dir else None,
                    try_download_gcs=False,
                    force_checksums_validation=registered,
                )
            )
    except (tfds.download.DownloadError, NonMatchingChecksumError) as error:
        raise ValueError(f'data set "{name}": {" ".join(str(error).split())}') from error
    except OSError as error:
        if (folder / "dataset_info.json").is_file():  # another process was quicker
            return folder
        fix = (
            "pass the original files with --config.data.manual_dir=DIR"
            if error.errno is None  # the network's errors, which are OSErrors without a number
            else "choose a writable folder with --config.data.data_dir=DIR"
        )
        raise ValueError(
            f'data set "{name}" could not be prepared in data_dir={data_dir} '
            f"({' '.join(str(error).split())[:200]}): {fix}"
        ) from error
    return folder


def builder_class(name: str) -> Any:
    """TFDS's builder of `name` with the reading replaced by ours.

    Args:
        name: one of `READERS`.
    """
    import tensorflow_datasets as tfds

    base = tfds.builder_cls(name)
    read = READERS[name]

    class Builder(base, skip_registration=True):  # pyright: ignore
        name = base.name

        def _split_generators(self, dl_manager):
            return read(self, dl_manager)

        def _generate_examples(self, *args, **kwargs):
            raise NotImplementedError("the split generators bring their examples along")

    return Builder


def _idx(builder: Any, dl_manager: Any) -> dict[str, Examples]:
    prefixes = {"train": "train", "test": "t10k"}
    kinds = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    urls = {f"{p}-{k}": f"{builder.URL}{p}-{k}" for p in prefixes.values() for k in kinds}
    paths = dl_manager.download(urls)
    return {
        split: _idx_examples(*(gzip.decompress(paths[f"{p}-{k}"].read_bytes()) for k in kinds))
        for split, p in prefixes.items()
    }


def _emnist(builder: Any, dl_manager: Any) -> dict[str, Examples]:
    path = dl_manager.download(builder.URL)
    kinds = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    with zipfile.ZipFile(path) as archive:
        stem = f"gzip/emnist-{builder.builder_config.name}"
        return {
            split: _idx_examples(
                *(gzip.decompress(archive.read(f"{stem}-{split}-{k}")) for k in kinds)
            )
            for split in ("train", "test")
        }


def _idx_examples(images: bytes, labels: bytes) -> Examples:
    size = np.frombuffer(images, ">i4", count=3, offset=4)
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(size)
    for i, label in enumerate(np.frombuffer(labels, np.uint8, offset=8)):
        yield i, {"image": _png(pixels[i]), "label": int(label)}


def _cifar(builder: Any, dl_manager: Any) -> dict[str, Examples]:
    info = builder._cifar_info
    files = {}
    with tarfile.open(dl_manager.download(info.url)) as archive:
        for name in (*info.label_files, *info.train_files, *info.test_files):
            member = archive.extractfile(info.prefix + name)
            assert member is not None
            files[name] = member.read()
    for key, name in zip(info.label_keys, info.label_files, strict=True):
        builder.info.features[key].names = files[name].decode().split()
    return {
        split: _cifar_examples(split, b"".join(files[name] for name in names), info.label_keys)
        for split, names in (("train", info.train_files), ("test", info.test_files))
    }


def _cifar_examples(split: str, data: bytes, label_keys: list[str]) -> Examples:
    rows = np.frombuffer(data, np.uint8).reshape(-1, len(label_keys) + 3 * 32 * 32)
    for i, row in enumerate(rows):
        labels = {key: int(label) for key, label in zip(label_keys, row, strict=False)}
        image = row[len(label_keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
        yield i, {"id": f"{split}_{i:05d}", "image": _png(image), **labels}


def _png(pixels: np.ndarray) -> io.BytesIO:
    # TFDS encodes arrays through TensorFlow, and takes encoded files as they are. Written out here
    # because an image library's overhead is several times the work for a picture this small.
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)  # column 0: no filter
    rows[:, 1:] = pixels.reshape(height, -1)
    colour = 0 if pixels.ndim == 2 else 2  # grey, RGB
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 1)),
        (b"IEND", b""),
    )
    encoded = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + encoded)


READERS = {
    "mnist": _idx,
    "fashion_mnist": _idx,
    "kmnist": _idx,
    "emnist": _emnist,
    "cifar10": _cifar,
    "cifar100": _cifar,
}
