"""Omniglot's characters from the original archive, and tasks drawn from them.

    one task: `ways` characters, `shots` drawings of each to adapt on, `queries` others to judge by

In meta-training each character of a task is turned and mirrored in one of eight ways, as one that
nobody has seen; no task has the same character twice. Elsewhere characters stand upright.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.checks import UserError
from bilevel_flax.data import draws

SIDE = 20
FILES = ("images_background_small1.zip", "images_background.zip")
SYMMETRIES = 8  # of a square
_STREAM = 31  # of the tasks' draws


class Characters(NamedTuple):
    """Drawings, by character."""

    images: np.ndarray  # uint8 [characters, drawers, 1 + copies, SIDE, SIDE], ink is 255
    alphabets: tuple[str, ...]  # of each character


class Tasks(NamedTuple):
    """Tasks as codes of `drawn`; a label is a position in `ways`."""

    support: np.ndarray  # int32 [tasks, ways, shots]
    query: np.ndarray  # int32 [tasks, ways, queries]


def drawn(pixels: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [n, SIDE, SIDE] in [0, 1] and labels [n] of a task's `codes` [ways, each].

    Args:
        pixels: all drawings, [drawings, SIDE, SIDE] in [0, 255].
        codes: int32, SYMMETRIES * position in `pixels` + the symmetry.
    """
    ways, each = codes.shape
    flat = codes.reshape(-1)
    images = pixels[flat // SYMMETRIES] / 255.0
    bit = lambda i: (flat // 2**i % 2 == 1)[:, None, None]
    images = jnp.where(bit(0), images[:, ::-1], images)
    images = jnp.where(bit(1), images[:, :, ::-1], images)
    images = jnp.where(bit(2), images.swapaxes(1, 2), images)
    return images, jnp.repeat(jnp.arange(ways), each)


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
    images = np.stack([np.stack(images) for images in drawings.values()])[:, :, None]
    return Characters(images, tuple(alphabet for alphabet, _ in drawings))


def distorted(characters: Characters, copies: int) -> Characters:
    """With copies of each drawing that are a little rotated, sheared, stretched and shifted."""
    from scipy import ndimage

    shape = characters.images.shape
    flat = characters.images.reshape(-1, SIDE, SIDE)
    images = np.repeat(flat[:, None], 1 + copies, 1)
    amounts = 2 * draws.uniform(len(flat) * copies * 6, 0, _STREAM + 2) - 1
    middle = np.full(2, (SIDE - 1) / 2)
    for i, amount in enumerate(amounts.reshape(-1, 6)):
        angle, shear, stretch, shift = amount[0] / 4, amount[1] / 4, amount[2:4] / 5, amount[4:]
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ np.array([[1, shear], [0, 1]]) * np.exp(stretch)
        offset: Any = middle - matrix @ middle + shift * SIDE / 14
        drawing, copy = divmod(i, copies)
        ndimage.affine_transform(
            flat[drawing], matrix, offset, order=1, output=images[drawing, 1 + copy]
        )
    return characters._replace(images=images.reshape(*shape[:2], 1 + copies, SIDE, SIDE))


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
    augment: bool = False,
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
        augment: any of the symmetries for each character of a task, any copy of each drawing.
            False: upright, and as they were drawn.

    Raises:
        UserError: too few characters, or too few drawings of each.
    """
    chosen = choose(characters, alphabets, key)
    drawers, copies = characters.images.shape[1:3]
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
    positions = (classes[..., None] * drawers + drawing) * copies
    symmetry = np.zeros((count, ways, 1), int)
    if augment:
        pick = draws.uniform(drawing.size + symmetry.size, seed, _STREAM + 3)
        symmetry = (SYMMETRIES * pick[: symmetry.size]).astype(int).reshape(symmetry.shape)
        positions = positions + (copies * pick[symmetry.size :]).astype(int).reshape(drawing.shape)
    codes = (SYMMETRIES * positions + symmetry).astype(np.int32)
    return Tasks(codes[..., :shots], codes[..., shots:])


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
