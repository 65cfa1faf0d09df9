"""Images of the user's own: arrays and folders come out as they went in; mistakes are one line."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.datasets import sources

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 5, 4), np.uint8)
LABELS = np.arange(30) % 3


def write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "abc"[label] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def pairs(images: np.ndarray, labels: np.ndarray) -> set[tuple[bytes, int]]:
    return {(i.tobytes(), int(k)) for i, k in zip(images, labels, strict=True)}


def everything(data: sources.ImageData) -> set[tuple[bytes, int]]:
    parts = ("train", "validation", "test")
    return set().union(
        *(pairs(getattr(data, f"{p}_images"), getattr(data, f"{p}_labels")) for p in parts)
    )


def test_a_file_and_a_folder_of_the_same_images_are_the_same_data(tmp_path: Path):
    np.savez(tmp_path / "mine.npz", images=IMAGES, labels=LABELS)
    write(tmp_path / "mine", IMAGES, LABELS)
    for name, classes in (("mine.npz", ("0", "1", "2")), ("mine", ("a", "b", "c"))):
        data = sources.load(str(tmp_path / name))
        assert data.class_names == classes
        assert data.train_images.shape == (18, 5, 4, 1)
        assert (len(data.validation_labels), len(data.test_labels)) == (6, 6)
        assert everything(data) == pairs(IMAGES, LABELS)


def test_a_test_part_stays_apart(tmp_path: Path):
    arrays = {"images": IMAGES[:20], "labels": LABELS[:20]}
    tests = {"test_images": IMAGES[20:], "test_labels": LABELS[20:]}
    np.savez(tmp_path / "mine.npz", **arrays, **tests)
    write(tmp_path / "mine" / "train", IMAGES[:20], LABELS[:20])
    write(tmp_path / "mine" / "test", IMAGES[20:], LABELS[20:])
    for name in ("mine.npz", "mine"):
        data = sources.load(str(tmp_path / name))
        assert pairs(data.test_images, data.test_labels) == pairs(IMAGES[20:], LABELS[20:])
        assert (len(data.train_labels), len(data.validation_labels)) == (16, 4)


def pack(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            archive.add(file, file.relative_to(folder))


def test_a_tar_is_the_folder_that_was_packed(tmp_path: Path):
    write(tmp_path / "mine" / "train", IMAGES[:20], LABELS[:20])
    write(tmp_path / "mine" / "test", IMAGES[20:], LABELS[20:])
    pack(tmp_path / "mine", tmp_path / "mine.tar")
    one, other = (sources.load(str(tmp_path / name)) for name in ("mine", "mine.tar"))
    for part in ("train", "validation", "test"):
        for kind in ("images", "labels"):
            arrays = (getattr(data, f"{part}_{kind}") for data in (one, other))
            np.testing.assert_array_equal(*arrays)
    assert one.class_names == other.class_names == ("a", "b", "c")


@pytest.mark.parametrize("packed", [True, False])
def test_images_stand_in_for_a_sets_original_files(packed: bool, tmp_path: Path):
    manual, prepared = tmp_path / "manual", tmp_path / "prepared"
    write(tmp_path / "mine" / "train", IMAGES[:20], LABELS[:20])
    write(tmp_path / "mine" / "test", IMAGES[20:], LABELS[20:])
    if packed:
        manual.mkdir()
        pack(tmp_path / "mine", manual / "cifar10_part.tar")
    else:
        (tmp_path / "mine").rename(manual)
    where = {"manual_dir": manual, "data_dir": prepared}
    data = sources.load("cifar10", **where, splits=(12, 8, 6))
    assert [len(getattr(data, f"{p}_labels")) for p in ("train", "validation", "test")] == [
        12,
        8,
        6,
    ]
    assert pairs(data.test_images, data.test_labels) <= pairs(IMAGES[20:], LABELS[20:])
    assert not prepared.exists()
    with pytest.raises(ValueError, match="20"):
        sources.load("cifar10", **where, splits=(25_000, 25_000, 6))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "no array 'images', only labels"),
        ({"images": IMAGES}, "no array 'labels'"),
        ({"images": IMAGES / 255, "labels": LABELS}, "images must be uint8 .* got float64"),
        ({"images": IMAGES[0], "labels": LABELS}, r"got uint8\[5, 4\]"),
        ({"images": IMAGES, "labels": LABELS[:7]}, r"labels must be integers \[30\], .*\[7\]"),
        ({"images": IMAGES, "labels": LABELS - 1}, "-1"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "got float64"),
    ],
)
def test_arrays_that_are_none_are_one_line(arrays: dict[str, Any], message: str, tmp_path: Path):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        sources.load(str(tmp_path / "mine.npz"))
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file or folder"):
        sources.load(str(tmp_path / "gone.npz"))
    with pytest.raises(ValueError, match="no CLASS/IMAGE files"):
        sources.load(str(tmp_path))
    (tmp_path / "bad.npz").write_text("not a file of arrays")
    with pytest.raises(ValueError, match="no readable .npz file"):
        sources.load(str(tmp_path / "bad.npz"))
    (tmp_path / "bad.tar").write_text("not a tar")
    with pytest.raises(ValueError, match="no readable tar"):
        sources.load(str(tmp_path / "bad.tar"))
    write(tmp_path / "mine", IMAGES[:3], LABELS[:3])
    Image.fromarray(IMAGES[0][:2]).save(tmp_path / "mine" / "a" / "small.png")
    with pytest.raises(ValueError, match=r"small.png is \[2, 4, 1\], .* \[5, 4, 1\]"):
        sources.load(str(tmp_path / "mine"))
    (tmp_path / "mine" / "a" / "small.png").write_text("no image")
    with pytest.raises(ValueError, match="small.png is no readable image"):
        sources.load(str(tmp_path / "mine"))
