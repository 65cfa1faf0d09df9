"""Omniglot's characters from the original archive, and tasks drawn from them.

    one task: `ways` characters, `shots` drawings of each to adapt on, `queries` others to judge by

Characters turned by 90, 180 and 270 degrees count as characters of their own, as is usual in
meta-training and meta-test (`with_turns`).

References:
    B. Lake, R. Salakhutdinov, J. Tenenbaum. Human-level concept learning through probabilistic
    program induction. Science 350(6266), 2015.
    O. Vinyals, C. Blundell, T. Lillicrap, K. Kavukcuoglu, D. Wierstra. Matching networks for one
    shot learning. NeurIPS 2016 (the protocol).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilevel_flax.checks import UserError
from bilevel_flax.data import draws

SIDE = 28
FILES = ("images_background_small1.zip", "images_background.zip")
_STREAM = 31  # of the tasks' draws


class Characters(NamedTuple):
    """Drawings, by character."""

    images: np.ndarray  # uint8 [characters, drawers, SIDE, SIDE], ink is 255
    alphabets: tuple[str, ...]  # of each character


class Tasks(NamedTuple):
    """Tasks as positions in `images.reshape(-1, SIDE, SIDE)`; a label is a position in `ways`."""

    support: np.ndarray  # int32 [tasks, ways, shots]
    query: np.ndarray  # int32 [tasks, ways, queries]


def read(folder: str | Path | None) -> Characters:
    """Reads the archive that lies in a folder.

    Args:
        folder: with one of `FILES`.

    Raises:
        UserError: it is not there, or holds no ALPHABET/CHARACTER/DRAWING.png.
    """
    from PIL import Image

    names = " or ".join(FILES)
    if folder is None:
        raise UserError(f"--config.data.manual_dir is missing: give the folder that holds {names}")
    found = [Path(folder).expanduser() / name for name in FILES]
    found = [path for path in found if path.is_file()]
    if not found:
        raise UserError(f"--config.data.manual_dir={folder} holds no {names}")
    drawings: dict[tuple[str, str], list[np.ndarray]] = {}
    with zipfile.ZipFile(found[0]) as archive:
        for name in sorted(archive.namelist()):
            parts = name.split("/")
            if not name.endswith(".png") or len(parts) != 4:
                continue
            with Image.open(io.BytesIO(archive.read(name))) as image:
                small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
            drawings.setdefault((parts[1], parts[2]), []).append(255 - np.asarray(small))
    if len({len(images) for images in drawings.values()}) != 1:
        raise UserError(f"{found[0]}: its characters are drawn by different numbers of people")
    images = np.stack([np.stack(images) for images in drawings.values()])
    return Characters(images, tuple(alphabet for alphabet, _ in drawings))


def with_turns(characters: Characters) -> Characters:
    """The characters and their three quarter turns."""
    images = np.concatenate([np.rot90(characters.images, k, (2, 3)) for k in range(4)])
    return Characters(images, 4 * characters.alphabets)


def choose(characters: Characters, alphabets: Sequence[str], key: str) -> np.ndarray:
    """Positions of the characters of some alphabets.

    Raises:
        UserError: there is no such alphabet; names the key of the config.
    """
    known = sorted(set(characters.alphabets))
    for name in alphabets:
        if name not in known:
            raise UserError(f"{key}={name}: no such alphabet, there are {', '.join(known)}")
    return np.flatnonzero(np.isin(characters.alphabets, list(alphabets)))


def draw(
    characters: Characters,
    alphabets: Sequence[str],
    key: str,
    *,
    ways: int,
    shots: int,
    queries: int,
    count: int,
    seed: int,
) -> Tasks:
    """So many tasks of the characters of some alphabets; characters of one task differ.

    Args:
        characters: all there are.
        alphabets: whose to draw from.
        key: of the config, for errors.
        ways: characters in a task.
        shots: drawings of each to adapt on.
        queries: others to judge by.
        count: tasks.
        seed: a pure function of it.

    Raises:
        UserError: too few characters, or too few drawings of each.
    """
    chosen = choose(characters, alphabets, key)
    drawers = characters.images.shape[1]
    if len(chosen) < ways:
        raise UserError(
            f"--config.ways={ways}: {key} ({', '.join(alphabets)}) has {len(chosen)} characters"
        )
    if shots + queries > drawers:
        raise UserError(
            f"--config.shots={shots} and --config.queries={queries}: each character has {drawers} "
            "drawings"
        )
    one = lambda task: draws.permutation(len(chosen), seed, _STREAM, task)[:ways]
    classes = chosen[np.stack([one(task) for task in range(count)])]
    order = draws.uniform(count * ways * drawers, seed, _STREAM + 1).reshape(count, ways, drawers)
    drawing = np.argsort(order, -1)[..., : shots + queries]
    positions = (classes[..., None] * drawers + drawing).astype(np.int32)
    return Tasks(positions[..., :shots], positions[..., shots:])


def stack(tasks: Sequence[Tasks]) -> Tasks:
    """Several sets of tasks as one: a minibatch of tasks of your own, say.

    Raises:
        UserError: their numbers of ways, shots or queries differ.
    """
    shapes = [(t.support.shape[1], t.support.shape[2], t.query.shape[2]) for t in tasks]
    named = lambda shape: "{} ways, {} shots and {} queries".format(*shape)
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise UserError(
                f"tasks[{i}] has {named(shape)}, tasks[0] {named(shapes[0])}: the tasks of a "
                "minibatch are one array, so these must agree"
            )
    return Tasks(*(np.concatenate(leaves) for leaves in zip(*tasks, strict=True)))
