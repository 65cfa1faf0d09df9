"""Labelled images of the user's own: arrays in a file, or a folder with a folder for each class."""

import pathlib

import numpy as np

from examples.datasets.prepared import Part

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def is_own(name: str) -> bool:
    """Whether a name is a path: of an .npz file, or of a folder that is there."""
    return name.endswith(".npz") or pathlib.Path(name).expanduser().is_dir()


def read(name: str) -> tuple[dict[str, Part], list[str]]:
    """Reads images and labels.

    Args:
        name: an .npz file with `images`, uint8 [n, height, width] or [n, height, width, channels],
            and `labels`, integers [n]; or a folder, CLASS/IMAGE, all images of one size. Either may
            have a test part: `test_images` and `test_labels`, or train/CLASS/IMAGE and
            test/CLASS/IMAGE.

    Returns:
        The parts ("train", maybe "test"), and the names of the classes.

    Raises:
        ValueError: it is not there, or not as above; names the file or the array.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ValueError(f"--config.data.name={name}: no such file or folder")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config.data.name={name}: no readable .npz file ({error})") from error
    prefixes = {"train": ""} | ({"test": "test_"} if "test_images" in arrays else {})
    parts = {part: _arrays(arrays, prefix, name) for part, prefix in prefixes.items()}
    count = 1 + max(int(part.labels.max()) for part in parts.values())
    return parts, [str(number) for number in range(count)]


def _arrays(arrays: dict[str, np.ndarray], prefix: str, name: str) -> Part:
    missing = [key for key in (f"{prefix}images", f"{prefix}labels") if key not in arrays]
    if missing:
        raise ValueError(
            f"--config.data.name={name}: the file has no array {missing[0]!r}, only "
            f"{', '.join(arrays) or 'nothing'}"
        )
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise ValueError(
            f"--config.data.name={name}: {prefix}images must be uint8 [n, height, width] or "
            f"[n, height, width, channels], got {images.dtype}{list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"--config.data.name={name}: {prefix}labels must be integers [{len(images)}], one for "
            f"each image, got {labels.dtype}{list(labels.shape)}"
        )
    return Part(images[..., None] if images.ndim == 3 else images, labels.astype(np.int32))


def _folder(path: pathlib.Path) -> tuple[dict[str, Part], list[str]]:
    split = (path / "train").is_dir()
    roots = {"train": path / "train" if split else path}
    if split and (path / "test").is_dir():
        roots["test"] = path / "test"
    names = sorted(
        {child.name for root in roots.values() for child in root.iterdir() if child.is_dir()}
    )
    parts = {part: _images(root, names) for part, root in roots.items()}
    return parts, names


def _images(root: pathlib.Path, names: list[str]) -> Part:
    from PIL import Image

    images, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((root / name).glob("*")):
            if file.suffix.lower() not in _SUFFIXES:
                continue
            try:
                with Image.open(file) as image:
                    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
            except OSError as error:
                raise ValueError(f"{file} is no readable image ({error})") from error
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            if images and pixels.shape != images[0].shape:
                raise ValueError(
                    f"{file} is {list(pixels.shape)}, the images before it {list(images[0].shape)}"
                    ": bring all of them to one size and one mode"
                )
            images.append(pixels)
            labels.append(label)
    if not images:
        raise ValueError(f"--config.data.name={root}: no CLASS/IMAGE files in there")
    return Part(np.stack(images), np.array(labels, np.int32))
