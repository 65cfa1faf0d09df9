"""Labelled images of the user's own: arrays in a file, or CLASS/IMAGE files in a folder or tar."""

import io
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np

from examples.datasets.prepared import Part

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
# An image's place, relative to the root: (CLASS, file name); and how to open it.
_Files = Iterator[tuple[tuple[str, ...], bytes]]


def is_own(name: str) -> bool:
    """Whether a name is a path: of an .npz file or a tar, or of a folder that is there."""
    is_file = name.endswith((".npz", *_TARS))
    return is_file or (bool(name) and pathlib.Path(name).expanduser().is_dir())


def beside_originals(name: str, folder: pathlib.Path) -> pathlib.Path | None:
    """Images of a named data set in a folder where its original files are not.

    Args:
      name: the data set's, "cifar10".
      folder: with train/CLASS/IMAGE (and test/CLASS/IMAGE), or with one tar of such files whose
        name begins with the data set's.

    Returns:
      What `read` takes; None: there is no such thing.
    """
    if any((folder / "train").glob("*/*")):
        return folder
    tars = [path for path in sorted(folder.glob(f"{name}*")) if path.name.endswith(_TARS)]
    return tars[0] if len(tars) == 1 else None


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
        return _parts(name, _files_of_folder(path))
    if path.is_file() and name.endswith(_TARS):
        return _parts(name, _files_of_tar(path))
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


def _files_of_folder(path: pathlib.Path) -> _Files:
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in _SUFFIXES and file.is_file():
            yield file.relative_to(path).parts, file.read_bytes()


def _files_of_tar(path: pathlib.Path) -> _Files:
    try:
        with tarfile.open(path) as archive:
            members = sorted(archive.getmembers(), key=lambda member: member.name)
            for member in members:
                place = pathlib.PurePosixPath(member.name)
                if place.suffix.lower() not in _SUFFIXES or not member.isfile():
                    continue
                file = archive.extractfile(member)
                assert file is not None
                yield tuple(part for part in place.parts if part != "."), file.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"--config.data.name={path}: no readable tar ({error})") from error


def _parts(name: str, files: _Files) -> tuple[dict[str, Part], list[str]]:
    """Images by part: those below `train` and `test`, or all of them."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    whole: list[tuple[str, np.ndarray]] = []
    for place, content in files:
        if len(place) == 3 and place[0] in ("train", "test"):
            images, label = found.setdefault(place[0], []), place[1]
        elif len(place) == 2:
            images, label = whole, place[0]
        else:
            continue
        images.append((label, _pixels("/".join((name, *place)), content, images)))
    if "train" not in found:
        found = {"train": whole}
    if not all(found.values()):
        raise ValueError(f"--config.data.name={name}: no CLASS/IMAGE files in there")
    names = sorted({label for images in found.values() for label, _ in images})
    number = {label: position for position, label in enumerate(names)}
    return {
        part: Part(
            np.stack([pixels for _, pixels in images]),
            np.array([number[label] for label, _ in images], np.int32),
        )
        for part, images in found.items()
    }, names


def _pixels(name: str, content: bytes, before: list[tuple[str, np.ndarray]]) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{name} is no readable image ({error})") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if before and pixels.shape != before[0][1].shape:
        raise ValueError(
            f"{name} is {list(pixels.shape)}, the images before it {list(before[0][1].shape)}: "
            "bring all of them to one size and one mode"
        )
    return pixels
